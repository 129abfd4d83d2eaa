"""Files that are correct for a long way, so that reading them takes time or memory, and wrong at their end.

All of it counts up to what the reader allows in a header; a sparse file costs its sender nothing.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from gguf_writer import ARRAY, STRING, U8, U64, Tensor, Value, gguf_bytes

from lib_qswap.quant.gguf_reader import ENTRY_PIECES, MAX_HEADER_BYTES, MAX_PIECES

from .catalogue import FILE_NAME, attack, attack_in_folder

ENTRIES = MAX_PIECES // ENTRY_PIECES
WRONG = Tensor("wrong", type=99)


def array(item_type: int, count: int, rest: bytes) -> Value:
    return Value(ARRAY, struct.pack("<IQ", item_type, count) + rest)


def sparse(folder: Path, content: bytes, nbytes: int) -> Path:
    path = folder / FILE_NAME
    path.write_bytes(content)
    os.truncate(path, nbytes)
    return path


@attack("tensor wrong (type)")
def as_many_strings_as_are_allowed() -> bytes:
    count = MAX_PIECES - 2 * ENTRY_PIECES
    return gguf_bytes([WRONG], {"k": array(STRING, count, bytes(8 * count))})


@attack("tensor wrong (type)")
def as_many_strings_of_40_bytes_as_are_allowed() -> bytes:
    count = MAX_PIECES - 2 * ENTRY_PIECES
    return gguf_bytes([WRONG], {"k": array(STRING, count, (struct.pack("<Q", 40) + bytes(40)) * count)})


def strings_of(nbytes: int, before: int = 0) -> bytes:
    """As many of so many bytes, lengths included, as a header may hold, behind some empty ones."""
    count = min(MAX_PIECES - 2 * ENTRY_PIECES, (MAX_HEADER_BYTES - 8 * before - 4096) // nbytes)
    strings = bytes(8 * before) + (struct.pack("<Q", nbytes - 8) + bytes(nbytes - 8)) * count
    return gguf_bytes([WRONG], {"k": array(STRING, before + count, strings)})


@attack("tensor wrong (type)")
def strings_of_140_bytes() -> bytes:
    return strings_of(140)


@attack("tensor wrong (type)")
def strings_of_256_bytes() -> bytes:
    return strings_of(256)


@attack("tensor wrong (type)")
def strings_of_which_a_small_window_holds_none() -> bytes:
    return strings_of(8208)


@attack("tensor wrong (type)")
def strings_of_which_a_large_window_holds_one_behind_short_ones() -> bytes:
    return strings_of(131_200, before=40_000)


@attack("more entries than any model's header has")
def five_million_empty_strings() -> bytes:
    return gguf_bytes([WRONG], {"k": array(STRING, 5_000_000, bytes(40_000_000))})


@attack("tensor wrong (type)")
def as_many_nested_arrays_as_are_allowed() -> bytes:
    count = ENTRIES - 2
    return gguf_bytes([WRONG], {"k": array(ARRAY, count, struct.pack("<IQQ", U64, 1, 2**63) * count)})


@attack("more entries than any model's header has")
def a_million_nested_arrays() -> bytes:
    return gguf_bytes([WRONG], {"k": array(ARRAY, 1 << 20, struct.pack("<IQ", U8, 0) * (1 << 20))})


@attack("more entries than any model's header has")
def nested_arrays_that_multiply() -> bytes:
    inner = struct.pack("<IQ", ARRAY, 150) + struct.pack("<IQ", U8, 0) * 150
    return gguf_bytes([WRONG], {"k": array(ARRAY, 150, inner * 150)})


@attack("tensor wrong (offset)")
def as_many_tensors_as_are_allowed() -> bytes:
    names = [f"model.diffusion_model.double_blocks.{i}.weight" for i in range(ENTRIES - 1)]
    tensors = [Tensor(name, (1, 1, 1, 32), "Q8_0", b"", i * 64) for i, name in enumerate(names)]
    return gguf_bytes([*tensors, Tensor("wrong", offset=1 << 30)]) + bytes(ENTRIES * 64)


@attack("tensor wrong (type)")
def as_many_keys_of_a_kilobyte_as_are_allowed() -> bytes:
    return gguf_bytes([WRONG], {f"{i:01024d}": i for i in range(ENTRIES - 1)})


@attack("tensor wrong (type)")
def as_many_arrays_of_256_numbers_as_are_allowed() -> bytes:
    value = array(U64, 256, struct.pack("<256Q", *range(2**63, 2**63 + 256)))
    return gguf_bytes([WRONG], {f"k{i}": value for i in range(ENTRIES - 1)})


@attack("tensor wrong (type)")
def as_many_strings_in_small_arrays_as_are_allowed() -> bytes:
    value = array(STRING, 60, (struct.pack("<Q", 2) + b"\xff\xff") * 60)
    return gguf_bytes([WRONG], {f"k{i}": value for i in range(ENTRIES // 2)})


@attack("tensor wrong (type)")
def six_thousand_strings_of_ten_kilobytes() -> bytes:
    value = Value(STRING, struct.pack("<Q", 10_000) + b"\xff" * 10_000)
    return gguf_bytes([WRONG], {f"k{i}": value for i in range(6_000)})


@attack_in_folder("name of tensor 0")
def a_string_of_60_megabytes(folder: Path) -> Path:
    content = gguf_bytes(metadata={"k": Value(STRING, struct.pack("<Q", 60 << 20))}, tensor_count=1)
    return sparse(folder, content, 1 << 30)


@attack_in_folder("k: the header exceeds 64 MiB")
def a_string_of_a_gigabyte(folder: Path) -> Path:
    return sparse(folder, gguf_bytes(metadata={"k": Value(STRING, struct.pack("<Q", 1 << 30))}), 2 << 30)


@attack_in_folder("k (40000000 items): the header exceeds 64 MiB")
def an_array_of_more_than_a_header(folder: Path) -> Path:
    return sparse(folder, gguf_bytes(metadata={"k": array(U64, 40_000_000, b"")}), 2 << 30)


@attack_in_folder("k: the header exceeds 64 MiB")
def strings_each_longer_than_what_is_read_at_once(folder: Path) -> Path:
    path = sparse(folder, gguf_bytes(metadata={"k": array(STRING, 1000, b"")}), 2 << 30)
    first = 24 + 8 + len("k") + 4 + 12
    with open(path, "r+b") as file:
        for i in range(1000):
            file.seek(first + i * 300_000)
            file.write(struct.pack("<Q", 300_000 - 8))
    return path

"""Damage to GGUF files that keeps to their structure, for tests with random files and for the fuzzer.

A file is a list of fields (`fields_of`), each an integer, the bytes of a string, or a run of numbers; damage
is a list of changes to fields. Put together again, the rest of the file still means what it did, so that
reading goes on to the code that comes after the field.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from gguf_writer import ARRAY, I32, STRING, Tensor, Value, gguf_bytes

from lib_qswap.quant.gguf_file import GGUFError, GGUFFile, open_gguf
from lib_qswap.quant.gguf_reader import MetadataArray
from lib_qswap.quant.inspect import format_report, inspect_file

_ITEM_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

# What makes trouble in a count, a length, an offset or a type.
NUMBERS = [0, 1, 2, 3, 7, 8, 9, 12, 13, 31, 32, 33, 255, 256, 257, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**48,
           2**60, 2**61, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 8, 2**64 - 1]  # fmt: skip
TEXTS = [b"", b"\0", b"\xff", b"\x1b[2J", b"a", b"general.alignment", b"split.count", b"split.no",
         b"split.tensors.count", b"comfy.gguf.orig_shape.a.weight", b"norm", b"n" * 1025]  # fmt: skip

KINDS = ("number", "text", "text and its length", "delete", "repeat", "exchange", "cut", "byte")

_NOISE = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()
VALID = gguf_bytes(
    [
        Tensor("a.weight", (4, 256), "Q4_K", _NOISE[:576]),
        Tensor("b.weight", (2, 3, 32), "Q8_0", _NOISE[:204]),
        Tensor("norm", (16,), "F32", _NOISE[:64]),
    ],
    {
        "general.architecture": "flux",
        "general.description": "Longer than what the fuzzer's reader keeps in memory.",
        "general.alignment": 32,
        "list": Value(ARRAY, [Value(ARRAY, ["x", "yz"])], ARRAY),
        "tokens": [f"t{i}" for i in range(300)],
        "comfy.gguf.orig_shape.b.weight": Value(ARRAY, [6, 32], I32),
    },
)
HEADER_BYTES = len(VALID) - 576 - 224 - 64


class Change(NamedTuple):
    """A change of one field; the numbers may be anything: they are taken modulo what there is."""

    kind: int  # of KINDS
    field: int
    value: int


def damaged(content: bytes, changes: Sequence[Change]) -> bytes:
    """`content` with all changes, one after the other."""
    fields = fields_of(content)
    for change in changes:
        _apply(fields, change)
    return b"".join(fields)


def _apply(fields: list[bytes], change: Change) -> None:
    if not fields:
        return
    kind, index, value = KINDS[change.kind % len(KINDS)], change.field % len(fields), change.value
    field = fields[index]
    if kind == "number":
        number = NUMBERS[value % len(NUMBERS)].to_bytes(8, "little")
        fields[index] = number[: len(field)] if len(field) in (1, 2, 4, 8) else number
    elif kind == "text":
        fields[index] = TEXTS[value % len(TEXTS)]
    elif kind == "text and its length":
        text = TEXTS[value % len(TEXTS)]
        fields[index : index + 2] = [struct.pack("<Q", len(text)), text]
    elif kind == "delete":
        del fields[index]
    elif kind == "repeat":
        fields.insert(index, field)
    elif kind == "exchange":
        other = value % len(fields)
        fields[index], fields[other] = fields[other], field
    elif kind == "cut":
        fields[index:] = [field[: value % (len(field) + 1)]]
    elif field:
        position = value % len(field)
        fields[index] = field[:position] + bytes([value // 7 % 256]) + field[position + 1 :]


def fields_of(content: bytes) -> list[bytes]:
    """The fields of a little-endian file as far as it can be followed, and then the rest."""
    fields: list[bytes] = []
    position = 0

    def take(nbytes: int) -> bytes:
        nonlocal position
        if position + nbytes > len(content):
            raise EOFError
        fields.append(content[position : position + nbytes])
        position += nbytes
        return fields[-1]

    def number(nbytes: int) -> int:
        return int.from_bytes(take(nbytes), "little")

    def value(kind: int) -> None:
        if kind == STRING:
            take(number(8))
        elif kind == ARRAY:
            item_kind, count = number(4), number(8)
            if item_kind in _ITEM_BYTES:
                take(_ITEM_BYTES[item_kind] * count)
            else:
                for _ in range(count):
                    value(item_kind)
        else:
            take(_ITEM_BYTES[kind])

    try:
        take(4)
        take(4)
        tensors, values = number(8), number(8)
        for _ in range(values):
            take(number(8))
            value(number(4))
        for _ in range(tensors):
            take(number(8))
            take(8 * number(4))
            take(4)
            take(8)
    except (EOFError, KeyError, RecursionError):
        pass
    return [*fields, content[position:]]


def read_all_or_refuse(path: str | os.PathLike[str]) -> str | None:
    """Everything that reading a file can do: only a GGUFError may stop it, on opening, or where a tensor of a
    type that nothing unpacks is asked for. What the first says."""
    try:
        file = open_gguf(path)
    except GGUFError as refusal:
        message = str(refusal)
        assert os.path.dirname(path) in message
        assert message.isprintable(), message
        return message
    for value in file.metadata.values():
        if isinstance(value, MetadataArray):
            assert len(list(value)) == len(value)
        str(value)
    for info in file.tensors:
        name = info.name
        if info.format.unpack is None:
            assert " (type): " in _refusal(file, name), name
            continue
        tensor = file[name]
        assert tensor.packed.nbytes == tensor.source.nbytes, name
        padding = 0 if tensor.source.nbytes else file.metadata.get("general.alignment", 32) - 1
        assert tensor.source.offset + tensor.source.nbytes <= tensor.source.file.size + padding, name
        tensor.packed.sum()
    report = format_report(inspect_file(path))
    assert len(report.splitlines()) <= 60
    return None


def _refusal(file: GGUFFile, name: str) -> str:
    try:
        file[name]
    except GGUFError as refusal:
        return str(refusal)
    raise AssertionError(f"{name} was not refused")

"""Reading the header of a GGUF file: metadata and tensor descriptions, none of which is believed.

Layout (GGUF specification, versions 2 and 3): magic "GGUF", version u32, tensor count u64, metadata count
u64; the metadata (key string, value type u32, value); the tensor descriptions (name string, dimension count
u32, dimensions u64 each with the fastest first, ggml_type u32, offset u64 from the start of the data);
padding up to `general.alignment`; the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from .gguf_reader import ENTRY_PIECES, MAX_PIECES, UINT32, Reader
from .mapped_file import MappedFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Limits of a header beside those of gguf_reader.py; ggml's names have 63 bytes.
MAX_NAME_BYTES = 1024
MAX_KEY_BYTES = MAX_NAME_BYTES + 64  # some keys are a prefix and the name of a tensor
MAX_DIMENSIONS = 8

KIND_BYTES = 64
"""How much of the beginning of a file `other_kind` looks at."""
_SPACE = b"\xef\xbb\xbf \t\r\n"  # a byte order mark, too
_MOST_SAFETENSORS_HEADER_BYTES = 100_000_000


class RawTensor(NamedTuple):
    """A tensor as the header describes it: fastest dimension first, offset from the start of the data."""

    name: str
    dimensions: tuple[int, ...]
    ggml_id: int
    offset: int


class Header(NamedTuple):
    version: int
    byte_order: str  # of struct: "<" or ">"
    metadata: dict[str, Any]
    tensors: tuple[RawTensor, ...]
    alignment: int
    data_start: int


def read_header(file: MappedFile) -> Header:
    """Read all before the data, and check what can be without knowing tensor types. Raises GGUFError."""
    start = Reader(file)
    magic = start.take(4, "magic")
    if magic != MAGIC:
        beginning = magic + start.take(min(KIND_BYTES, file.size) - 4, "magic")
        raise start.error(
            other_kind(beginning)
            or _safetensors(beginning, file.path)
            or f"not a GGUF file (it begins with {magic!r}, not {MAGIC!r})"
        )
    version, byte_order = start.number("I", "version"), "<"
    if version > 0xFFFF:
        version, byte_order = _swapped(version), ">"
    if version not in VERSIONS:
        big_endian = " (big-endian)" if byte_order == ">" else ""
        raise start.error(
            f"version {version}{big_endian} is not supported (2 and 3 are): convert the model again with"
            " current tools"
        )
    reader = Reader(file, byte_order, start.position)
    tensor_count = reader.number("Q", "tensor count")
    # The smallest description: an empty name, no dimensions. The smallest metadata: an empty key, one byte.
    metadata_count = reader.number("Q", "metadata count")
    counts = f"{tensor_count} tensors and {metadata_count} metadata values"
    reader.need(tensor_count * 24 + metadata_count * 13, counts)
    if tensor_count + metadata_count > MAX_PIECES // ENTRY_PIECES:
        raise reader.error(f"{counts} make no sense: damaged; download it again")
    reader.spend((tensor_count + metadata_count) * ENTRY_PIECES, counts)

    metadata = dict(_unique(reader, "metadata key", _metadata(reader, metadata_count)))
    alignment = _alignment(reader, metadata)
    tensors = dict(_unique(reader, "tensor", _tensors(reader, tensor_count)))
    data_start = -(-reader.position // alignment) * alignment
    values = {key: value for key, (_, value) in metadata.items()}
    return Header(version, byte_order, values, tuple(tensors.values()), alignment, data_start)


def other_kind(beginning: bytes) -> str | None:
    """What comes under the name of a model file and is none, and what to do; None: not known by its
    beginning."""
    if beginning.lstrip(_SPACE).lower().startswith((b"<!doctype html", b"<html")):
        return "this is a web page, not the file: download it again"
    if beginning.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer: run `git lfs pull`"
    return None


def _safetensors(beginning: bytes, path: str) -> str | None:
    """Of a safetensors file: a length of its header (u64) and a JSON object."""
    length = int.from_bytes(beginning[:8], "little")
    if length > _MOST_SAFETENSORS_HEADER_BYTES or beginning[8:9] != b"{":
        return None
    if path.lower().endswith(".safetensors"):
        return "this is a safetensors file, where a GGUF file is needed"
    return "this is a safetensors file: rename it to .safetensors (`qswap run` takes GGUF only)"


def _swapped(number: int) -> int:
    return int.from_bytes(number.to_bytes(4, "little"), "big")


def _unique(reader: Reader, what: str, pairs: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    seen = set()
    for name, value in pairs:
        if name in seen:
            raise reader.error(f"{what} {name}: appears twice")
        seen.add(name)
        yield name, value


def _metadata(reader: Reader, count: int) -> Iterator[tuple[str, tuple[int, Any]]]:
    """(key, (value type, value)) of each."""
    for index in range(count):
        key = reader.name(f"metadata key {index}", MAX_KEY_BYTES)
        kind = reader.number("I", f"{key} (value type)")
        yield key, (kind, reader.value(key, kind))


def _alignment(reader: Reader, metadata: dict[str, tuple[int, Any]]) -> int:
    kind, alignment = metadata.get("general.alignment", (UINT32, DEFAULT_ALIGNMENT))
    if kind != UINT32:
        raise reader.error(f"general.alignment: must be a u32 (value type {UINT32}), not value type {kind}")
    if alignment == 0 or alignment & (alignment - 1):
        raise reader.error(f"general.alignment: {alignment} is not a power of two")
    return alignment


def _tensors(reader: Reader, count: int) -> Iterator[tuple[str, RawTensor]]:
    for index in range(count):
        name = reader.name(f"name of tensor {index}", MAX_NAME_BYTES)
        dimension_count = reader.number("I", f"tensor {name} (dimension count)")
        if dimension_count > MAX_DIMENSIONS:
            raise reader.error(
                f"tensor {name} (dimension count): {dimension_count}, at most {MAX_DIMENSIONS} make sense"
            )
        dimensions = reader.numbers("Q", dimension_count, f"tensor {name} (dimensions)")
        if 0 in dimensions and dimensions != (0,):  # That is a mark: SDXL's "v_pred" is an empty tensor.
            raise reader.error(f"tensor {name} (dimensions): one of {dimensions} is 0")
        ggml_id = reader.number("I", f"tensor {name} (type)")
        offset = reader.number("Q", f"tensor {name} (offset)")
        yield name, RawTensor(name, dimensions, ggml_id, offset)

"""Writes GGUF files for tests, field by field, so that each field can be wrong.

`gguf_bytes(tensors, metadata)` gives a valid file (GGUF specification, version 3, little-endian, data aligned
to 32); every keyword argument, and every field of `Tensor` and `Value`, replaces what would be written there.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Value types of metadata.
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i",
    F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d",
}  # fmt: skip

# ggml_type of the types that tests use: (number, elements of a block, bytes of a block).
GGML = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144),
        "I8": (24, 1, 1), "I32": (26, 1, 4), "BF16": (30, 1, 2)}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A metadata value of an exact type; a list is an array of `item_kind`; bytes are written as they are."""

    kind: int
    value: Any
    item_kind: int = STRING


@dataclass(frozen=True)
class Tensor:
    """A tensor of zeros, or of `data`; `shape` has rows first, as in torch, `offset` counts from the data."""

    name: str | bytes
    shape: Sequence[int] = (2, 256)
    type: str | int = "Q4_K"
    data: bytes | None = None
    offset: int | None = None

    def payload(self) -> bytes:
        if self.data is not None:
            return self.data
        elements = 1
        for size in self.shape:
            elements *= size
        _, block_elements, block_bytes = GGML.get(str(self.type), (0, 1, 1))
        return bytes(elements // block_elements * block_bytes)


def gguf_bytes(
    tensors: Sequence[Tensor] = (),
    metadata: Mapping[str | bytes, Any] | Sequence[tuple[str | bytes, Any]] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    byte_order: str = "<",
    tensor_count: int | None = None,
    metadata_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """The bytes of a GGUF file."""
    pairs = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if metadata_count is None else metadata_count,
    )
    out = bytearray(magic + struct.pack(f"{byte_order}IQQ", version, *counts))
    for key, value in pairs:
        out += _string(key, byte_order) + _value(value, byte_order)
    data = bytearray()
    for tensor in tensors:
        data += bytes(-len(data) % alignment)
        offset = len(data) if tensor.offset is None else tensor.offset
        data += tensor.payload()
        number = GGML[tensor.type][0] if isinstance(tensor.type, str) else tensor.type
        out += _string(tensor.name, byte_order)
        out += struct.pack(f"{byte_order}I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        out += struct.pack(f"{byte_order}IQ", number, offset)
    out += bytes(-len(out) % alignment)
    return bytes(out + data)


def _string(text: str | bytes, byte_order: str) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack(f"{byte_order}Q", len(raw)) + raw


def _value(value: Any, byte_order: str) -> bytes:
    if isinstance(value, bytes):
        return value  # type and all
    if not isinstance(value, Value):
        kinds = {bool: BOOL, int: U32, float: F32, str: STRING}
        if isinstance(value, list):
            value = Value(ARRAY, value, kinds[type(value[0])] if value else STRING)
        else:
            value = Value(kinds[type(value)], value)
    return struct.pack(f"{byte_order}I", value.kind) + _payload(value, byte_order)


def _payload(value: Value, byte_order: str) -> bytes:
    if isinstance(value.value, bytes):
        return value.value
    if value.kind == STRING:
        return _string(value.value, byte_order)
    if value.kind == ARRAY:
        items = [item if isinstance(item, Value) else Value(value.item_kind, item) for item in value.value]
        head = struct.pack(f"{byte_order}IQ", value.item_kind, len(items))
        return head + b"".join(_payload(item, byte_order) for item in items)
    return struct.pack(byte_order + _CODES[value.kind], value.value)

"""A .gguf file as a mapping of packed weights: validated, mapped, not copied.

`open_gguf` reads the header only. Each tensor is built when it is asked for, and aliases the map; plain
tensors (F32, F16, BF16 ...) under 1 MiB, the norms and biases that hosts read most, have their bytes copied
into RAM.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .formats import WITHDRAWN, Format, by_ggml_id
from .gguf_header import MAX_DIMENSIONS, Header, RawTensor, read_header
from .mapped_file import FileSlice, GGUFError, MappedFile
from .packed import PackedTensor

__all__ = ["FileSlice", "GGUFError", "GGUFFile", "MappedFile", "TensorInfo", "open_gguf"]

# Plain tensors below this many bytes live in RAM.
COPIED_BELOW_BYTES = 1 << 20

# Where converters that fold a tensor (rows shorter than a block, five dimensions) keep its shape.
_ORIGINAL_SHAPE_KEY = "comfy.gguf.orig_shape."
_SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class TensorInfo(NamedTuple):
    """Where a tensor is: shape in torch's order (rows first), offset in bytes from the start of the file."""

    name: str
    format: Format
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile(Mapping[str, PackedTensor]):
    """The tensors of a GGUF file by name, in the order of the file.

    Attributes:
        path, version: of the file.
        metadata: plain Python values; a long array is a sequence that is decoded when it is looked into.
        tensors: what the header says of each tensor.
        file: the map, for `check_unchanged`.

    Quantized tensors have the logical dtype fp16, plain ones their own; `.to(dtype)` gives another. Asking
    for a tensor of a type that nothing unpacks raises GGUFError.
    """

    def __init__(self, file: MappedFile, header: Header) -> None:
        self.file = file
        self.path = file.path
        self.version = header.version
        self.metadata: dict[str, Any] = header.metadata
        self.tensors = _located(file, header)
        self._by_name = {info.name: info for info in self.tensors}

    def __getitem__(self, name: str) -> PackedTensor:
        info = self._by_name[name]
        if info.format.unpack is None:
            raise GGUFError(
                f"{self.path}: tensor {name} (type): {info.format.name} is no type for weights, and nothing"
                " unpacks it: take a file of another type, or quantize the model again (to Q8_0, say)"
            )
        source = FileSlice(self.file, info.offset, info.nbytes)
        # Tensors made in inference mode could not be used outside it.
        with torch.inference_mode(False):
            packed = _copied(source) if _is_copied(info) else self.file.tensor(info.offset, info.nbytes)
            return PackedTensor(packed, info.format, info.shape, info.format.dtype or torch.float16, source)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        return f"GGUFFile({self.path!r}, {len(self)} tensors)"


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file of version 2 or 3; nothing but its header is read.

    Raises GGUFError, in one line that names the file and the tensor or field, when the file cannot be opened,
    is damaged, is one part of a split model, is big-endian, or has tensors of an unknown type.
    """
    file = MappedFile(path)
    header = read_header(file)
    _refuse_split(file, header)
    return GGUFFile(file, header)


def _is_copied(info: TensorInfo) -> bool:
    return info.format.dtype is not None and info.nbytes < COPIED_BELOW_BYTES


def _copied(source: FileSlice) -> Tensor:
    packed = torch.empty(source.nbytes, dtype=torch.uint8)
    source.read_into(packed)
    return packed


def _refuse_split(file: MappedFile, header: Header) -> None:
    count = header.metadata.get("split.count", 1)
    number = header.metadata.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int):
        raise GGUFError(f"{file.path}: split.count, split.no: must be integers, not {count!r}, {number!r}")
    part, parts = number + 1, count
    match = _SPLIT_NAME.search(file.path)
    if match and parts <= 1:
        part, parts = int(match[1]), int(match[2])
    if parts > 1:
        raise GGUFError(
            f"{file.path}: part {part} of a model split into {parts} files: join them first"
            " (llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf) and open the whole"
        )


def _located(file: MappedFile, header: Header) -> tuple[TensorInfo, ...]:
    """The tensors with type, shape and place checked against the file; GGUFError for the first that fails."""
    tensors = tuple(_locate(file, header, raw) for raw in header.tensors)
    by_place = sorted(tensors, key=lambda info: info.offset)
    for before, after in itertools.pairwise(by_place):
        if before.offset + before.nbytes > after.offset:
            raise GGUFError(
                f"{file.path}: tensor {after.name} (offset): begins inside of tensor {before.name}:"
                " damaged; download it again"
            )
    return tensors


def _locate(file: MappedFile, header: Header, raw: RawTensor) -> TensorInfo:
    def error(field: str, message: str) -> GGUFError:
        return GGUFError(f"{file.path}: tensor {raw.name} ({field}): {message}")

    format = by_ggml_id(raw.ggml_id)
    if format is None and raw.ggml_id in WITHDRAWN:
        raise error(
            "type",
            f"{WITHDRAWN[raw.ggml_id]} (type id {raw.ggml_id}) is no longer part of GGUF: take a file of"
            " another type, or quantize the model again with current tools",
        )
    if format is None:
        raise error(
            "type",
            f"type id {raw.ggml_id} is unknown: update QSwap, or take a file quantized to a published type",
        )
    if header.byte_order == ">":
        raise error(
            "byte order",
            f"the file is big-endian, which is not supported for {format.name}: convert it to little-endian"
            " (gguf-py: gguf-convert-endian FILE little)",
        )
    elements = math.prod(raw.dimensions)
    row = raw.dimensions[0] if raw.dimensions else 1
    if row % format.block_elements:
        raise error("shape", f"rows of {row} elements are no whole number of {format.name} blocks")
    nbytes = format.packed_bytes(elements)
    offset = header.data_start + raw.offset
    if raw.offset % header.alignment:
        raise error("offset", f"{raw.offset} is not a multiple of the alignment, {header.alignment}")
    if offset + nbytes > file.size:
        raise error(
            "offset",
            f"{format.name} of shape {raw.dimensions[::-1]} ends at byte {offset + nbytes},"
            f" the file has {file.size}: truncated or damaged; download it again",
        )
    return TensorInfo(raw.name, format, _shape(header, raw, elements), offset, nbytes)


def _shape(header: Header, raw: RawTensor, elements: int) -> tuple[int, ...]:
    """The logical shape, rows first: the one that the converter noted where it holds as many elements."""
    noted = header.metadata.get(_ORIGINAL_SHAPE_KEY + raw.name)
    if (
        isinstance(noted, list)
        and len(noted) <= MAX_DIMENSIONS
        and all(type(size) is int and size > 0 for size in noted)
        and math.prod(noted) == elements
    ):
        return tuple(noted)
    return raw.dimensions[::-1]

"""A .gguf file as a mapping of packed weights: validated, mapped, not copied.

`open_gguf` reads nothing but the header, or those of all parts of a split model. Each tensor is built when it
is asked for, and aliases the map; plain tensors (F32, F16, BF16 ...) under 1 MiB, the norms and biases that
hosts read most, have their bytes copied into RAM.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .formats import WITHDRAWN, Format, by_ggml_id
from .gguf_header import MAX_DIMENSIONS, Header, RawTensor
from .gguf_split import Part, open_parts
from .mapped_file import FileSlice, GGUFError, MappedFile
from .packed import PackedTensor

__all__ = ["FileSlice", "GGUFError", "GGUFFile", "MappedFile", "TensorInfo", "open_gguf"]

# Plain tensors below this many bytes live in RAM.
COPIED_BELOW_BYTES = 1 << 20

# Where converters that fold a tensor (rows shorter than a block, five dimensions) keep its shape.
_ORIGINAL_SHAPE_KEY = "comfy.gguf.orig_shape."


class TensorInfo(NamedTuple):
    """Where a tensor is: shape in torch's order (rows first), offset in bytes from the start of the file,
    which is `GGUFFile.files[part]`."""

    name: str
    format: Format
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0


class GGUFFile(Mapping[str, PackedTensor]):
    """The tensors of a GGUF file by name, in the order of the file; of all parts where the model is split.

    Attributes:
        path, version, metadata: of the file, or of the first part. Metadata are plain Python values, but for
            long ones: an array is a sequence that is decoded when it is looked into, a text comes by `str()`.
        tensors: what the headers say of each tensor.
        files: the maps, one for each part. alignments: of the tensors in each, bytes.

    Quantized tensors have the logical dtype fp16, plain ones their own; `.to(dtype)` gives another. Asking
    for a tensor of a type that nothing unpacks raises GGUFError.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.files = tuple(part.file for part in parts)
        self.alignments = tuple(part.header.alignment for part in parts)
        self.path = parts[0].file.path
        self.version = parts[0].header.version
        self.metadata: dict[str, Any] = parts[0].header.metadata
        self.tensors = _located(parts)
        self._by_name = {info.name: info for info in self.tensors}

    def __getitem__(self, name: str) -> PackedTensor:
        info = self._by_name[name]
        file = self.files[info.part]
        if info.format.unpack is None:
            raise GGUFError(
                f"{file.path}: tensor {name} (type): {info.format.name} is no type for weights, and nothing"
                " unpacks it: take a file of another type, or quantize the model again (to Q8_0, say)"
            )
        source = FileSlice(file, info.offset, info.nbytes)
        # Tensors made in inference mode could not be used outside it.
        with torch.inference_mode(False):
            packed = _copied(source) if _is_copied(info) else file.tensor(info.offset, info.nbytes)
            return PackedTensor(packed, info.format, info.shape, info.format.dtype or torch.float16, source)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name  # Mapping's own would build the tensor.

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def check_unchanged(self) -> None:
        """GGUFError when one of the files is no longer the one that was opened."""
        for file in self.files:
            file.check_unchanged()

    def __repr__(self) -> str:
        return f"GGUFFile({self.path!r}, {len(self)} tensors)"


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file of version 2 or 3, or the first part of a split one; nothing but headers is read.

    Raises GGUFError, in one line that names the file and the tensor or field, when the file cannot be opened,
    is damaged, is a later part of a split model or lacks one, is big-endian, or has tensors of an unknown
    type.
    """
    return GGUFFile(open_parts(path))


def _is_copied(info: TensorInfo) -> bool:
    return not info.nbytes or (info.format.dtype is not None and info.nbytes < COPIED_BELOW_BYTES)


def _copied(source: FileSlice) -> Tensor:
    packed = torch.empty(source.nbytes, dtype=torch.uint8, device="cpu")  # whatever device is the default
    source.read_into(packed)
    return packed


def _located(parts: Sequence[Part]) -> tuple[TensorInfo, ...]:
    """The tensors with type, shape and place checked; GGUFError for the first that fails."""
    metadata = parts[0].header.metadata
    found: dict[str, TensorInfo] = {}
    for index, (file, header) in enumerate(parts):
        tensors = [_locate(file, header, raw, metadata, index) for raw in header.tensors]
        by_place = sorted((info for info in tensors if info.nbytes), key=lambda info: info.offset)
        for before, after in itertools.pairwise(by_place):
            if before.offset + before.nbytes > after.offset:
                raise GGUFError(
                    f"{file.path}: tensor {after.name} (offset): begins inside of tensor {before.name}:"
                    " damaged; download it again"
                )
        for info in tensors:
            if info.name in found:
                raise GGUFError(
                    f"{file.path}: tensor {info.name}: part {found[info.name].part + 1} of the model has one"
                    " of the same name: damaged, or parts of different models; download them again"
                )
            found[info.name] = info
    return tuple(found.values())


def _locate(
    file: MappedFile, header: Header, raw: RawTensor, metadata: Mapping[str, Any], part: int
) -> TensorInfo:
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
    if nbytes >= 1 << 63:
        raise error(
            "shape", f"{raw.dimensions[::-1]} of {format.name} are more than any file can hold: damaged file"
        )
    offset = header.data_start + raw.offset
    if raw.offset % header.alignment:
        raise error("offset", f"{raw.offset} is not a multiple of the alignment, {header.alignment}")
    # Behind the last tensor a converter may not pad: an empty one begins where the padding would end.
    if offset + nbytes > file.size + (0 if nbytes else header.alignment - 1):
        raise error(
            "offset",
            f"{format.name} of shape {raw.dimensions[::-1]} ends at byte {offset + nbytes},"
            f" the file has {file.size}: truncated or damaged; download it again",
        )
    return TensorInfo(raw.name, format, _shape(metadata, raw, elements), offset, nbytes, part)


def _shape(metadata: Mapping[str, Any], raw: RawTensor, elements: int) -> tuple[int, ...]:
    """The logical shape, rows first: the one that the converter noted where it holds as many elements."""
    noted = metadata.get(_ORIGINAL_SHAPE_KEY + raw.name)
    if (
        isinstance(noted, Sequence)
        and len(noted) <= MAX_DIMENSIONS
        and all(type(size) is int and size > 0 for size in noted)
        and math.prod(noted) == elements
    ):
        return tuple(noted)
    return raw.dimensions[::-1]

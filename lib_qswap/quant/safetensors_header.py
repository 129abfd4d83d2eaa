"""What a safetensors file says of its tensors: a JSON object of names, dtypes, shapes and places, of which
nothing is believed.

bitsandbytes keeps a weight in several tensors: half bytes as U8, and beside them how they were made, under
names like `WEIGHT.quant_state.bitsandbytes__nf4`.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from .gguf_header import KIND_BYTES, MAGIC, other_kind
from .mapped_file import GGUFError, MappedFile

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # as in the reference implementation
_METADATA_KEY = "__metadata__"
_BNB = {".quant_state.bitsandbytes__nf4": "BNB_NF4", ".quant_state.bitsandbytes__fp4": "BNB_FP4"}


class StoredTensor(NamedTuple):
    """type: the dtype as the file calls it, or BNB_NF4, BNB_FP4; parameters: weights; a byte of
    bitsandbytes holds two, and its shape is not in the header; offset: bytes from the start of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    parameters: int
    offset: int
    nbytes: int


def read_header(file: MappedFile) -> tuple[dict[str, str], list[StoredTensor]]:
    """(metadata, tensors) in the order of the file's header.

    Raises GGUFError, in one line, for a file that is damaged or no safetensors file.
    """

    def damaged(why: str) -> GGUFError:
        return GGUFError(f"{file.path}: {why}: no safetensors file, or damaged; download it again")

    beginning = _read(file, 0, min(KIND_BYTES, file.size))
    if beginning.startswith(MAGIC):
        raise GGUFError(f"{file.path}: this is a GGUF file: rename it to .gguf")
    if other := other_kind(beginning):
        raise GGUFError(f"{file.path}: {other}")
    start = beginning[:_LENGTH_BYTES]
    nbytes = int.from_bytes(start, "little")
    data_start = _LENGTH_BYTES + nbytes
    if len(start) < _LENGTH_BYTES or nbytes > _MOST_HEADER_BYTES or data_start > file.size:
        raise damaged(f"a header of {nbytes} bytes in a file of {file.size}")
    try:
        header = json.loads(_read(file, _LENGTH_BYTES, nbytes))
        metadata = header.pop(_METADATA_KEY, None) or {}
        tensors = [_tensor(name, entry, header, data_start) for name, entry in header.items()]
        metadata = {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise damaged("its header is not what a safetensors file has") from error
    for tensor in tensors:
        if not data_start <= tensor.offset <= tensor.offset + tensor.nbytes <= file.size:
            raise damaged(f"tensor {tensor.name[:100]!r} is not within the {file.size} bytes of the file")
    return metadata, tensors


def _tensor(name: str, entry: dict[str, Any], header: dict[str, Any], data_start: int) -> StoredTensor:
    begin, end = map(int, entry["data_offsets"])
    shape = tuple(map(int, entry["shape"]))
    kind = next((kind for suffix, kind in _BNB.items() if name + suffix in header), str(entry["dtype"]))
    parameters = math.prod(shape)
    if kind in _BNB.values():
        parameters *= 2
        shape = (parameters,)
    return StoredTensor(name, kind, shape, parameters, data_start + begin, end - begin)


def _read(file: MappedFile, offset: int, nbytes: int) -> bytes:
    buffer = bytearray(nbytes)
    try:
        count = file.read_at(offset, memoryview(buffer))
    except OSError as error:
        raise GGUFError(f"{file.path}: cannot be read: {error.strerror or error}") from error
    return bytes(buffer[:count])

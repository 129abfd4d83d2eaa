"""Reading the bytes of a packed weight, wherever they are.

Those that alias the map of a file are read from the file, piece by piece, and the map is not touched:
`mapped_file` says why. The pieces are small because a host may compute all of a text encoder on the CPU,
whose bytes in RAM would be gigabytes, beside those that the system caches of the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import traced
from .formats import Format
from .unpack import unpack

if TYPE_CHECKING:
    from .mapped_file import FileSlice

# What unpacking writes directly; every other dtype is reached by one more conversion, from fp32.
_UNPACKED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Whole chunks of `unpack`, with one thread, two, four or eight.
_PIECE_ELEMENTS = 9 << 19
_PIECE_BYTES = 4 << 20


def is_mapped(packed: Tensor, source: FileSlice | None) -> bool:
    """Whether `packed` aliases the map of the file, so that reading it could end the process."""
    return source is not None and source.file.holds(packed)


def copy_bytes(packed: Tensor, source: FileSlice | None, destination: Tensor) -> None:
    """Write `packed` into `destination`: uint8, contiguous, as long, on any device.

    Raises GGUFError or OSError when a file has to be read and cannot be.
    """
    flat = destination.view(-1)
    if source is None or not is_mapped(packed, source):
        flat.copy_(packed.view(-1))
    elif flat.device.type == "cpu":
        source.read_into(flat)
    else:
        for start, piece in source.pieces(_PIECE_BYTES):
            flat[start : start + piece.numel()].copy_(piece)


def write_values(
    format: Format, packed: Tensor, source: FileSlice | None, out: Tensor, **arithmetic: Any
) -> None:
    """Unpack into `out`: contiguous, of any dtype; `arithmetic` is what `unpack` takes.

    Raises GGUFError or OSError when a file has to be read and cannot be.
    """
    if source is None or not is_mapped(packed, source):
        _write_values(format, packed, out, arithmetic)
        return
    pieces = source.pieces(format.packed_bytes(_PIECE_ELEMENTS))
    for (_, piece), values in zip(pieces, out.view(-1).split(_PIECE_ELEMENTS), strict=True):
        _write_values(format, piece, values, arithmetic)


def _write_values(format: Format, packed: Tensor, out: Tensor, arithmetic: dict[str, Any]) -> None:
    if format.dtype is not None and (out.dtype == format.dtype or out.dtype not in _UNPACKED_DTYPES):
        # The bytes are the values, in either arithmetic.
        out.copy_(packed.view(-1).view(format.dtype).view(out.shape))
    elif out.dtype in _UNPACKED_DTYPES:
        (traced.unpack if traced.is_traced(packed) else unpack)(format, packed, out, **arithmetic)
    else:
        unpacked = torch.empty(out.shape, dtype=torch.float32, device=packed.device)
        out.copy_(unpack(format, packed, unpacked, **arithmetic))

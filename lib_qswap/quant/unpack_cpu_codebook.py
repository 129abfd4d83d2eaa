"""Types whose numbers stand for 16 fixed values, on a CPU: the values of `unpack_codebook` and `unpack_bnb`,
whose docstrings have the layouts, in the way of `unpack_cpu`. Four values come from a table at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .unpack_bnb import FP4_VALUES, NF4_VALUES
from .unpack_codebook import E2M1_DOUBLED, IQ4_VALUES, iq4_xs_scales, mxfp4_scales, nvfp4_scales
from .unpack_cpu import ChunkUnpacker
from .unpack_cpu_legacy import NibbleUnpacker
from .words import kept_numbers, kept_table

_EVEN, _ODD, _16 = kept_numbers(0x0000FFFF0000FFFF, ~0x0000FFFF0000FFFF, 16)
(_HALF,) = kept_numbers(0xFFFF)
_ROWS_OF_LOOK_UPS = 64


def _nibbles_of_pairs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every two bytes, as a number from 0 to 65,535: both low nibbles, then both high ones."""
    pairs = torch.arange(1 << 16)
    return pairs & 15, (pairs >> 8) & 15, (pairs >> 4) & 15, pairs >> 12


class _Codebook(NibbleUnpacker):
    signed = True
    values: tuple[int, ...]

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.table = _bytes_of_pairs(self.values)
        self.indices = [torch.empty_like(half) for half in self.halves]
        self.found = [torch.empty_like(half) for half in self.halves]
        self.short_words = [
            (indices.view(torch.int32), found.view(torch.int32))
            for indices, found in zip(self.indices, self.found, strict=True)
        ]
        self.part = torch.empty_like(self.low)

    def read_halves(self, blocks: Tensor) -> None:
        # Of every two pairs of bytes the even one, and the odd one.
        torch.bitwise_and(self.nibble_words, _EVEN, out=self.indices[0])
        torch.bitwise_right_shift(self.nibble_words, _16, out=self.indices[1]).bitwise_and_(_EVEN)
        for indices, found in self.short_words:
            torch.index_select(self.table, 0, indices, out=found)
        even, odd = self.found
        torch.bitwise_and(even, _EVEN, out=self.low)
        self.low.bitwise_or_(torch.bitwise_left_shift(odd, _16, out=self.part).bitwise_and_(_ODD))
        torch.bitwise_right_shift(even, _16, out=self.high).bitwise_and_(_EVEN)
        self.high.bitwise_or_(torch.bitwise_and(odd, _ODD, out=self.part))


@kept_table(maxsize=4)
def _bytes_of_pairs(values: tuple[int, ...]) -> Tensor:
    """int32 (65536,): the four values of `_nibbles_of_pairs`, a byte each."""
    of_nibbles = torch.tensor(values, dtype=torch.int8)
    return torch.stack([of_nibbles[nibble] for nibble in _nibbles_of_pairs()], 1).view(torch.int32).view(-1)


class IQ4_NL(_Codebook):
    values = IQ4_VALUES


class IQ4_XS(_Codebook):
    values = IQ4_VALUES
    nibble_bytes, field = 128, torch.int64

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return (iq4_xs_scales(blocks)[None],)


class MXFP4(_Codebook):
    values = E2M1_DOUBLED
    field = torch.uint8

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return (mxfp4_scales(blocks)[None],)


class NVFP4(_Codebook):
    values = E2M1_DOUBLED
    nibble_bytes, field, piece = 32, torch.int32, torch.int64

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return (nvfp4_scales(blocks)[None],)


class _FourBits(ChunkUnpacker):
    """bitsandbytes': the values are fp32 themselves, and lie in order."""

    width, planes, parts = 64, 1, 4
    values: tuple[float, ...]

    def __init__(self, blocks: int) -> None:
        self.fields = torch.empty((blocks, 16), dtype=torch.int16)
        self.indices = torch.empty(16 * blocks, dtype=torch.int64)
        self.parts_of_indices = self.indices.view(self.parts, 1, -1).unbind(0)
        self.table = _fours_of_pairs(self.values).expand(_ROWS_OF_LOOK_UPS, -1)
        self.use_numbers(4 * self.parts_of_indices[0].numel())
        self.fours = self.numbers.view(torch.complex128).view(_ROWS_OF_LOOK_UPS, -1)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return (blocks.view(torch.float32)[:, 0].contiguous()[None, :, None],)

    def read(self, blocks: Tensor) -> Sequence[Tensor]:
        self.fields.copy_(blocks.view(torch.int16)[:, 2:])
        self.indices.copy_(self.fields.view(-1)).bitwise_and_(_HALF)
        return self.parts_of_indices

    def widen(self, of_plane: Tensor) -> None:
        # In rows, which torch divides among threads.
        torch.gather(self.table, 1, of_plane.view(_ROWS_OF_LOOK_UPS, -1), out=self.fours)


@kept_table(maxsize=4)
def _fours_of_pairs(values: tuple[float, ...]) -> Tensor:
    """complex128 (65536,): four fp32 values, of each byte its high nibble's, then its low one's."""
    of_nibbles = torch.tensor(values, dtype=torch.float32)
    low, next_low, high, next_high = (of_nibbles[nibble] for nibble in _nibbles_of_pairs())
    return torch.stack((high, low, next_high, next_low), 1).view(torch.complex128).view(-1)


class BNB_NF4(_FourBits):
    values = NF4_VALUES


class BNB_FP4(_FourBits):
    values = FP4_VALUES

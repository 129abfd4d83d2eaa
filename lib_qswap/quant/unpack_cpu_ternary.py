"""TQ1_0 and TQ2_0 on a CPU: the values of `unpack_ternary`, in the way of `unpack_cpu`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .unpack_cpu import ChunkUnpacker, HalfChunkUnpacker, means
from .words import as_words, byte_masks


class TQ1_0(ChunkUnpacker):
    """Bytes of five digits, in lanes of 16 bits: three times a byte has its first digit in the upper half."""

    width, planes, parts = 256, 1, 4
    signed = True

    def __init__(self, blocks: int) -> None:
        super().__init__((blocks, 32))
        # Of the even bytes and of the odd ones, with the scales, which are no digits, among them: each row
        # stays with its thread.
        self.lanes = torch.empty((2, blocks * 54 // 8), dtype=torch.int64).unbind(0)
        self.even, self.odd = self.lanes
        self.short_lanes = [lanes.view(torch.int16) for lanes in self.lanes]  # CPUs multiply these in one go.
        self.digits = torch.empty_like(self.even)
        self.odd_digits = torch.empty_like(self.odd)
        self.places = [self._places(digit) for digit in range(5)]
        self.low, self.digit, self.upper_digit, self._8 = torch.tensor(
            [0x00FF00FF00FF00FF, 0x0003000300030003, 0x0300030003000300, 8]
        ).unbind(0)
        self.three = torch.tensor(3, dtype=torch.int16)
        self.up, self.top = byte_masks(0x7F, 0x80).unbind(0)

    def _places(self, digit: int) -> list[tuple[Tensor, Tensor]]:
        """Where the digits of `digits` belong, in pairs: of 32 bytes, of 16, and, but the last one, of 4."""
        values, rows = self.words.view(torch.int16), self.digits.view(torch.int16).view(-1, 27)
        places = []
        for first, width, value in ((0, 16, 0), (16, 8, 80), (24, 2, 120))[: 3 if digit < 4 else 2]:
            value += digit * width
            places.append((values[:, value : value + width], rows[:, first : first + width]))
        return places

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...] | None:
        return (blocks.view(torch.float16)[:, 26].float()[None, :, None],)

    def read(self, blocks: Tensor) -> Sequence[Tensor]:
        torch.bitwise_and(as_words(blocks), self.low, out=self.even)
        torch.bitwise_right_shift(as_words(blocks), self._8, out=self.odd).bitwise_and_(self.low)
        for number, places in enumerate(self.places):
            for lanes, short_lanes in zip(self.lanes, self.short_lanes, strict=True):
                if number:
                    lanes.bitwise_and_(self.low)
                short_lanes.mul_(self.three)
            torch.bitwise_right_shift(self.even, self._8, out=self.digits).bitwise_and_(self.digit)
            torch.bitwise_and(self.odd, self.upper_digit, out=self.odd_digits)
            self.digits.bitwise_or_(self.odd_digits)
            if self.signed:  # As in TQ2_0.
                self.digits.add_(self.up).bitwise_xor_(self.top)
            for place, digits in places:
                place.copy_(digits)
        return self.parts_of_bytes


class TQ1_0ToHalf(HalfChunkUnpacker, TQ1_0):
    """As digit * d - d, which has the right sign where it is zero only if d is more than that."""

    signed = False

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...] | None:
        d = blocks.view(torch.float16)[:, 26].float()[None]
        least, largest = torch.aminmax(d)
        if not (least > 0 and largest < math.inf):
            return None
        scale = d * self.UNIT
        mean = torch.empty_like(scale)
        means(scale, mean)
        return scale, d.neg_(), mean


class TQ2_0(ChunkUnpacker):
    """Every 32 bytes hold four planes of two bits."""

    width, planes, parts = 32, 4, 1
    signed = True

    def __init__(self, blocks: int) -> None:
        super().__init__((4, 8 * blocks))
        self.pairs = torch.empty((blocks, 32), dtype=torch.int16)
        self.pair_words = as_words(self.pairs)
        self.shifts = torch.tensor([0, 2, 4, 6]).unbind(0)
        self.two, self.up, self.top = byte_masks(0x03, 0x7F, 0x80).unbind(0)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        of_halves = blocks.view(torch.float16)[:, 32].float().repeat_interleave(2)
        return (of_halves.expand(4, -1)[:, :, None],)

    def read(self, blocks: Tensor) -> Sequence[Tensor]:
        self.pairs.copy_(blocks.view(torch.int16)[:, :32])
        for shift, plane in zip(self.shifts, self.planes_of_words, strict=True):
            torch.bitwise_right_shift(self.pair_words, shift, out=plane)
            # q + 127 with the top bit flipped is q - 1, and no byte overflows into the next.
            plane.bitwise_and_(self.two).add_(self.up).bitwise_xor_(self.top)
        return self.parts_of_bytes

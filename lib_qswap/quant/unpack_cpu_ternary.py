"""TQ1_0 and TQ2_0 on a CPU: the values of `unpack_ternary`, in the way of `unpack_cpu`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .unpack_cpu import ChunkUnpacker, HalfChunkUnpacker, column, means
from .words import as_words, byte_masks, kept_numbers


class TQ1_0(ChunkUnpacker):
    """Bytes of five digits, widened to 16 bits: three times a byte has its first digit in the upper half, and
    the byte of the others in the lower one. The digits stay there, as 256 times themselves."""

    width, planes, parts = 256, 1, 4

    def __init__(self, blocks: int) -> None:
        self.fractions = torch.empty((blocks, 52), dtype=torch.int16)
        self.flat_fractions = self.fractions.view(-1)  # CPUs multiply 16 bits in one instruction.
        self.fraction_words = as_words(self.fractions)
        self.digits = torch.empty_like(self.fractions)
        self.digit_words = as_words(self.digits)
        self.wide = torch.empty((blocks, 256), dtype=torch.int16)
        self.last = torch.empty((blocks, 4), dtype=torch.int64)
        self.last_of_wide, self.last_digits = self.wide[:, 240:], self.last.view(torch.int16)
        self.places_of_digits = [self._places(digit) for digit in range(5)]
        self.parts_of_wide = self.wide.view(self.parts, 1, -1).unbind(0)
        self.three, self.unit = torch.tensor([3, 256], dtype=torch.int16).unbind(0)
        self.upper, self.lower = kept_numbers(0x0300030003000300, 0x00FF00FF00FF00FF)
        self.make_buffers()

    def make_buffers(self) -> None:
        self.use_numbers(self.parts_of_wide[0].numel())

    def _places(self, digit: int) -> list[tuple[Tensor, Tensor]]:
        """Where the digits of each block's 32 bytes belong, its 16, and, but of the last digit, its 4, which
        `last` collects: 16 of a block are long enough for torch to divide them among threads."""
        places = [
            (self.wide[:, value + digit * width :][:, :width], self.digits[:, first:][:, :width])
            for first, width, value in ((0, 32, 0), (32, 16, 160))
        ]
        if digit < 4:
            places.append((self.last[:, digit], self.digits.view(torch.int64)[:, 12]))
        return places

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...] | None:
        return (column(blocks, 26).mul_(1 / 256)[None, :, None],)

    def read(self, blocks: Tensor) -> Sequence[Tensor]:
        self.read_digits(blocks)
        self.wide.sub_(self.unit)
        return self.parts_of_wide

    def read_digits(self, blocks: Tensor) -> None:
        self.fractions.copy_(blocks[:, :52])
        for places in self.places_of_digits:
            self.flat_fractions.mul_(self.three)
            torch.bitwise_and(self.fraction_words, self.upper, out=self.digit_words)
            self.fraction_words.bitwise_and_(self.lower)
            for place, digits in places:
                place.copy_(digits)
        self.last_of_wide.copy_(self.last_digits)


class _ToHalf(HalfChunkUnpacker):
    """As digit * d - d, which has the right sign where it is zero only if d is more than that."""

    scaled_width = 256

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...] | None:
        d = column(blocks, -1)[None]
        least, largest = torch.aminmax(d)
        if not (least > 0 and largest < math.inf):
            return None
        scale = d * self.UNIT
        mean = torch.empty_like(scale)
        means(scale, mean)
        return scale, d.neg_(), mean


class TQ1_0ToHalf(_ToHalf, TQ1_0):
    UNIT = HalfChunkUnpacker.UNIT / 256

    def make_buffers(self) -> None:
        self.use_widened(self.wide)

    def read(self, blocks: Tensor) -> Sequence[Tensor]:
        self.read_digits(blocks)
        return self.parts_of_wide


class TQ2_0(ChunkUnpacker):
    """Every 32 bytes hold four planes of two bits."""

    width, planes, parts = 32, 4, 1
    signed = True

    def __init__(self, blocks: int) -> None:
        super().__init__((4, 8 * blocks))
        self.pairs = torch.empty((blocks, 32), dtype=torch.int16)
        self.pair_words = as_words(self.pairs)
        self.shifts = kept_numbers(0, 2, 4, 6)
        self.two, self.up, self.top = byte_masks(0x03, 0x7F, 0x80)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...] | None:
        of_halves = column(blocks, 32).repeat_interleave(2)
        return (of_halves.expand(4, -1)[:, :, None],)

    def read(self, blocks: Tensor) -> Sequence[Tensor]:
        self.pairs.copy_(blocks.view(torch.int16)[:, :32])
        for shift, plane in zip(self.shifts, self.planes_of_words, strict=True):
            torch.bitwise_right_shift(self.pair_words, shift, out=plane).bitwise_and_(self.two)
            if self.signed:  # q + 127 with the top bit flipped is q - 1, and no byte overflows into the next.
                plane.add_(self.up).bitwise_xor_(self.top)
        return self.parts_of_bytes


class TQ2_0ToHalf(_ToHalf, TQ2_0):
    signed = False

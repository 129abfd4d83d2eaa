"""TQ1_0 and TQ2_0 on a CPU: the values of `unpack_ternary`, in the way of `unpack_cpu`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .unpack_cpu import ChunkUnpacker, HalfChunkUnpacker, means
from .words import as_words, byte_masks


class TQ1_0(ChunkUnpacker):
    """Bytes of five digits, in lanes of 16 bits: three times a byte has its first digit in the upper half."""

    width, planes = 256, 1
    signed = True

    def __init__(self, blocks: int) -> None:
        super().__init__((blocks, 32))
        fields = torch.empty(26 * blocks, dtype=torch.int16)
        sizes = (16, 8, 2)
        self.fields = [field.view(blocks, -1) for field in fields.split([size * blocks for size in sizes])]
        self.field_words = as_words(fields)
        # Of the even bytes and of the odd ones.
        self.lanes = torch.empty((2, self.field_words.numel()), dtype=torch.int64)
        self.even, self.odd = self.lanes.unbind(0)
        self.wholes = torch.empty_like(self.lanes)
        self.even_wholes, self.odd_wholes = self.wholes.unbind(0)
        self.columns = [self._columns(digit) for digit in range(5)]
        self.shifts = torch.tensor([[8], [0]])
        self.digits = torch.tensor([[0x0003000300030003], [0x0300030003000300]])
        self.low, self._8 = torch.tensor([0x00FF00FF00FF00FF, 8]).unbind(0)
        self.short_lanes = self.lanes.view(torch.int16)  # CPUs multiply these in one instruction.
        self.three = torch.tensor(3, dtype=torch.int16)
        self.up, self.top = byte_masks(0x7F, 0x80).unbind(0)

    def _columns(self, digit: int) -> list[tuple[Tensor, Tensor]]:
        """Where the digits of `even_wholes` belong: 16 bytes of every block at a time, or 4."""
        large, medium, small = self.even_wholes.split(
            [words * len(self.words) for words in (4, 2)] + [len(self.words) // 2]
        )
        values = self.words.view(torch.complex128)
        found = [(values[:, 2 * digit + half], large.view(torch.complex128)[half::2]) for half in range(2)]
        found.append((values[:, 10 + digit], medium.view(torch.complex128)))
        if digit < 4:
            found.append((self.words.view(torch.int32)[:, 60 + digit], small.view(torch.int32)))
        return found

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...] | None:
        return (blocks.view(torch.float16)[:, 26].float()[None, :, None],)

    def read(self, blocks: Tensor) -> Tensor:
        for field, of_blocks in zip(
            self.fields, blocks.view(torch.int16).split((16, 8, 2, 1), 1), strict=False
        ):
            field.copy_(of_blocks)
        torch.bitwise_and(self.field_words, self.low, out=self.even)
        torch.bitwise_right_shift(self.field_words, self._8, out=self.odd).bitwise_and_(self.low)
        for columns in self.columns:
            self.short_lanes.mul_(self.three)
            torch.bitwise_right_shift(self.lanes, self.shifts, out=self.wholes).bitwise_and_(self.digits)
            self.lanes.bitwise_and_(self.low)
            self.even_wholes.bitwise_or_(self.odd_wholes)
            if self.signed:  # As in TQ2_0.
                self.even_wholes.add_(self.up).bitwise_xor_(self.top)
            for of_values, of_digits in columns:
                of_values.copy_(of_digits)
        return self.bytes


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

    width, planes = 32, 4
    signed = True

    def __init__(self, blocks: int) -> None:
        super().__init__((4, 8 * blocks))
        self.pairs = torch.empty((blocks, 32), dtype=torch.int16)
        self.pair_words = as_words(self.pairs)
        self.shifts = torch.tensor([0, 2, 4, 6])[:, None]
        self.two, self.up, self.top = byte_masks(0x03, 0x7F, 0x80).unbind(0)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        of_halves = blocks.view(torch.float16)[:, 32].float().repeat_interleave(2)
        return (of_halves.expand(4, -1)[:, :, None],)

    def read(self, blocks: Tensor) -> Tensor:
        self.pairs.copy_(blocks.view(torch.int16)[:, :32])
        torch.bitwise_right_shift(self.pair_words, self.shifts, out=self.words)
        # q + 127 with the top bit flipped is q - 1, and no byte overflows into the next.
        self.words.bitwise_and_(self.two).add_(self.up).bitwise_xor_(self.top)
        return self.bytes

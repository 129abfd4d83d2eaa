"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 on a CPU: the values of `unpack_legacy`, whose docstrings have the layouts,
in the way of `unpack_cpu`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .unpack_cpu import ChunkUnpacker, column
from .unpack_legacy import bits_to_top
from .words import as_words, byte_masks, kept_numbers


class NibbleUnpacker(ChunkUnpacker):
    """Blocks that end in groups of bytes: low nibbles are the first half of a group, high ones the other.

    unit: what the scales are multiplied by. nibble_bytes: of a block. field: the dtype that the bytes are
    copied as, by measurement. piece: as large as a group.
    """

    width, planes, parts = 32, 1, 4
    unit = 1.0
    has_minimum = False
    nibble_bytes, field, piece = 16, torch.int16, torch.complex128

    def __init__(self, blocks: int) -> None:
        nibbles = torch.empty(blocks * self.nibble_bytes, dtype=torch.uint8)
        self.nibble_words = as_words(nibbles)
        self.nibbles = nibbles.view(self.field).view(blocks, -1)
        super().__init__((2 * self.nibble_words.numel(),))
        self.halves = torch.empty((2, self.nibble_words.numel()), dtype=torch.int64).unbind(0)
        self.low, self.high = self.halves
        # Copies of a group at a time: of smaller pieces there would be more.
        self.places = self.words.view(self.piece).view(-1, 2).unbind(1)
        self.pieces = [half.view(self.piece) for half in self.halves]

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        scale = column(blocks, 0).mul_(self.unit)[None, :, None]
        return (scale, column(blocks, 1)[None, :, None]) if self.has_minimum else (scale,)

    def read(self, blocks: Tensor) -> Sequence[Tensor]:
        self.nibbles.copy_(blocks.view(self.field)[:, -self.nibbles.shape[1] :])
        self.read_halves(blocks)
        for place, pieces in zip(self.places, self.pieces, strict=True):
            place.copy_(pieces)
        return self.parts_of_bytes

    def read_halves(self, blocks: Tensor) -> None:
        """`nibble_words` into `low` and `high`, a number in each byte."""
        raise NotImplementedError


class Q4_0(NibbleUnpacker):
    signed = True
    unit = 1 / 16

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.flip, self.top = byte_masks(0x88, 0xF0)
        (self.four,) = kept_numbers(4)

    def read_halves(self, blocks: Tensor) -> None:
        # With its top bit flipped, a high nibble read as signed is (q - 8) * 16.
        torch.bitwise_xor(self.nibble_words, self.flip, out=self.high)
        torch.bitwise_left_shift(self.high, self.four, out=self.low)
        for half in self.halves:
            half.bitwise_and_(self.top)


class Q4_1(NibbleUnpacker):
    has_minimum = True

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        (self.mask,) = byte_masks(0x0F)
        (self.four,) = kept_numbers(4)

    def read_halves(self, blocks: Tensor) -> None:
        torch.bitwise_and(self.nibble_words, self.mask, out=self.low)
        torch.bitwise_right_shift(self.nibble_words, self.four, out=self.high).bitwise_and_(self.mask)


class _FiveBits(NibbleUnpacker):
    """Four bytes of fifth bits lie before the nibbles."""

    unit = 1 / 8

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.fifth = torch.empty(blocks, dtype=torch.int16)
        self.fifth_bytes = self.fifth.view(torch.uint8)
        self.indices = torch.empty(2 * blocks, dtype=torch.int32)
        self.tops = torch.empty_like(self.low)
        self.table = bits_to_top(torch.device("cpu"))
        self.four, self.top = byte_masks(0x78, 0x80)
        self.one, self.three = kept_numbers(1, 3)

    def read_halves(self, blocks: Tensor) -> None:
        torch.bitwise_left_shift(self.nibble_words, self.three, out=self.low)
        torch.bitwise_right_shift(self.nibble_words, self.one, out=self.high)
        fields = blocks.view(torch.int16)
        for half, of_half in zip(self.halves, (-10, -9), strict=True):
            self.fifth.copy_(fields[:, of_half])
            self.indices.copy_(self.fifth_bytes)
            torch.index_select(self.table, 0, self.indices, out=self.tops)
            half.bitwise_and_(self.four).bitwise_or_(self.tops)


class Q5_0(_FiveBits):
    signed = True

    def read_halves(self, blocks: Tensor) -> None:
        super().read_halves(blocks)
        # With its top bit flipped, q * 8 read as signed is (q - 16) * 8.
        for half in self.halves:
            half.bitwise_xor_(self.top)


class Q5_1(_FiveBits):
    has_minimum = True


class Q8_0(ChunkUnpacker):
    """A block's scale stays in its row: that costs less than to copy the rows without it."""

    width, planes, parts = 32, 1, 4

    def __init__(self, blocks: int) -> None:
        self.numbers = torch.empty(34 * blocks // self.parts, dtype=torch.float32)
        self.rows = self.numbers.view(-1, 34)[:, 2:]

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return (column(blocks, 0)[None, :, None],)

    def read(self, blocks: Tensor) -> Sequence[Tensor]:
        return blocks.view(torch.int8).view(self.parts, 1, -1).unbind(0)

    def groups(self, count: int) -> Tensor:
        return self.rows

"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 on a CPU: the values of `unpack_legacy`, whose docstrings have the layouts,
in the way of `unpack_cpu`.

Where a block's scale and its numbers can stay in one row, they do: it costs less to scale a few bytes that
are no numbers than to copy the rows without them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .unpack_cpu import ChunkUnpacker
from .unpack_legacy import bits_to_top
from .words import as_words, byte_masks


class _Blocks32(ChunkUnpacker):
    """Blocks of 32 elements with one scale: the low nibbles are the first half, the high ones the other.

    skipped: bytes before the first nibble. units: what the scales of the two halves are multiplied by.
    """

    width, planes = 16, 2
    skipped: int
    units = (1.0, 1.0)
    has_minimum = False

    def __init__(self, blocks: int) -> None:
        super().__init__((2, blocks * (self.skipped + 16) // 8))
        self.low, self.high = self.words.unbind(0)
        self.unit = torch.tensor(self.units, dtype=torch.float32)[:, None]

    def make_buffers(self) -> None:
        super().make_buffers()
        rows = self.numbers.view(2, -1, self.skipped + 16)[:, :, self.skipped :]
        self.planes_of_numbers = rows.unbind(0)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        halves = blocks.view(torch.float16)
        scale = halves[:, 0].float() * self.unit
        if not self.has_minimum:
            return (scale[:, :, None],)
        return scale[:, :, None], halves[:, 1].float().expand(2, -1)[:, :, None]


class Q4_0(_Blocks32):
    skipped = 2
    signed = True
    units = (1 / 16, 1 / 16)

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.flip, self.top = byte_masks(0x88, 0xF0).unbind(0)
        self.four = torch.tensor(4)

    def read(self, blocks: Tensor) -> Tensor:
        # With its top bit flipped, a high nibble read as signed is (q - 8) * 16.
        torch.bitwise_xor(as_words(blocks), self.flip, out=self.high)
        torch.bitwise_left_shift(self.high, self.four, out=self.low)
        self.words.bitwise_and_(self.top)
        return self.bytes


class Q4_1(_Blocks32):
    skipped = 4
    units = (1.0, 1 / 16)
    has_minimum = True

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.masks = byte_masks(0x0F, 0xF0)[:, None]

    def read(self, blocks: Tensor) -> Tensor:
        torch.bitwise_and(as_words(blocks), self.masks, out=self.words)
        return self.bytes


class _FiveBits(_Blocks32):
    """Four bytes of fifth bits lie before the nibbles."""

    skipped = 0
    units = (1 / 8, 1 / 8)

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.nibbles = torch.empty((blocks, 8), dtype=torch.int16)
        self.nibble_words = as_words(self.nibbles)
        self.indices = torch.empty((2, blocks, 2), dtype=torch.int32)
        self.indices_of_block = self.indices.transpose(0, 1)
        self.fifth = torch.empty(self.words.numel(), dtype=torch.int64)
        self.table = bits_to_top(torch.device("cpu"))
        self.four, self.top = byte_masks(0x78, 0x80).unbind(0)
        self.one, self.three = torch.tensor([1, 3]).unbind(0)

    def read(self, blocks: Tensor) -> Tensor:
        fields = blocks.view(torch.int16)
        self.nibbles.copy_(fields[:, -8:])
        fifth = blocks[:, -20:-16].unflatten(1, (2, 2))
        self.indices_of_block.copy_(fifth)
        torch.bitwise_left_shift(self.nibble_words, self.three, out=self.low)
        torch.bitwise_right_shift(self.nibble_words, self.one, out=self.high)
        self.words.bitwise_and_(self.four)
        torch.index_select(self.table, 0, self.indices.view(-1), out=self.fifth)
        self.words.view(-1).bitwise_or_(self.fifth)
        return self.bytes


class Q5_0(_FiveBits):
    signed = True

    def read(self, blocks: Tensor) -> Tensor:
        super().read(blocks)
        # With its top bit flipped, q * 8 read as signed is (q - 16) * 8.
        self.words.bitwise_xor_(self.top)
        return self.bytes


class Q5_1(_FiveBits):
    has_minimum = True


class Q8_0(ChunkUnpacker):
    width, planes = 32, 1
    signed = True

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        super().__init__((0,))

    def make_buffers(self) -> None:
        self.numbers = torch.empty(34 * self.blocks, dtype=torch.float32)
        self.planes_of_numbers = (self.numbers.view(-1, 34)[:, 2:],)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return (blocks.view(torch.float16)[:, 0].float()[None, :, None],)

    def read(self, blocks: Tensor) -> Tensor:
        return blocks.view(torch.int8).view(-1)

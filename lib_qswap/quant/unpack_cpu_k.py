"""The K types on a CPU: the values of `unpack_k`, whose docstrings have the layouts, in the way of
`unpack_cpu`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .unpack_cpu import ChunkUnpacker, HalfChunkUnpacker, means
from .words import aligned, as_words, byte_masks, every_byte, kept_numbers

# A tensor, so that no call has to make one of it; so are all the masks and shifts below.
_LANES, _ODD_LANES = kept_numbers(0x00FF00FF00FF00FF, ~0x00FF00FF00FF00FF)


def _repeated_half(blocks: Tensor, offset: int, count: int) -> Tensor:
    """The fp16 number at an even byte offset of every block, `count` (4 or 8) times, fp32 (count * n,)."""
    bits = blocks.view(torch.int16)[:, offset // 2].long().bitwise_and_(_HALF)
    # A product with 0x0001000100010001 repeats 16 bits; copies of short rows take longer.
    repeated = bits.mul_(_FOUR_TIMES)
    if count == 8:
        repeated = torch.stack((repeated, repeated), 1).view(-1)
    return repeated.view(torch.float16).float()


# -- Q4_K and Q5_K: groups of 32 -----------------------------------------------------------------------------

# Of the words that hold four 6-bit numbers, and the other four in their upper half.
_LOW, _HIGH_TOPS, _HIGH_RESTS = kept_numbers(0x3F3F3F3F, 0x30303030 << 32, 0x0F0F0F0F << 32)
_HALVES, _SIGN_OF_SECOND, _TWICE = kept_numbers(0xFFFFFFFF, 0x80000000, 0x0000000100000001)
_HALF, _SIGN, _FOUR_TIMES = kept_numbers(0xFFFF, 0x8000, 0x0001000100010001)
_2, _4, _8, _16, _30, _32 = kept_numbers(2, 4, 8, 16, 30, 32)


class _SixBitNumbers:
    """The scales and minima of a number of blocks as bytes, in buffers that are allocated once: so many
    temporaries in fresh memory would be page faults."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.first, self.second, self.part = torch.empty((3, n), dtype=torch.int64).unbind(0)
        self.both = torch.empty((2, n), dtype=torch.int64)
        self.scales, self.minima = self.both.unbind(0)

    def read(self, blocks: Tensor) -> None:
        """Eight scales into every word of `scales`, eight minima into those of `minima`."""
        first, second, part = self.first, self.second, self.part
        for word, column in zip((first, second), blocks.view(torch.int64)[:, :2].unbind(1), strict=True):
            word.copy_(column)  # d, dmin, 4 scales; 4 minima, the 4 other scales' and minima's low bits
        torch.bitwise_right_shift(first, _32, out=self.scales).bitwise_and_(_LOW)
        self.scales.bitwise_or_(torch.bitwise_right_shift(first, _2, out=part).bitwise_and_(_HIGH_TOPS))
        self.scales.bitwise_or_(torch.bitwise_and(second, _HIGH_RESTS, out=part))
        torch.bitwise_and(second, _LOW, out=self.minima)
        self.minima.bitwise_or_(torch.bitwise_left_shift(second, _30, out=part).bitwise_and_(_HIGH_TOPS))
        self.minima.bitwise_or_(torch.bitwise_right_shift(second, _4, out=part).bitwise_and_(_HIGH_RESTS))


class _SixBitScales(_SixBitNumbers):
    """Scales, times the unit of their plane, and negative minima of a number of blocks.

    units: of the two planes, the low and the high nibbles of every 32 bytes.
    """

    def __init__(self, n: int, units: Sequence[float]) -> None:
        super().__init__(n)
        self.even, self.odd = small = torch.empty((2, n), dtype=torch.int64)
        self.bytes = small.view(torch.uint8)
        self.numbers = torch.empty((2, 8 * n), dtype=torch.float32)  # of each plane (n, 4, 2): scale, minimum
        self.halves = torch.empty(4 * n, dtype=torch.float32)
        self.repeated = torch.empty(8 * n, dtype=torch.float32)
        # Copies of 16 bytes at a time: of shorter ones there would be more, and rows of 4 take longer.
        self.repeat_from = self.halves.view(torch.complex128)
        self.repeat_to = self.repeated.view(torch.complex128).view(n, 2).unbind(1)
        self.units = [
            torch.tensor([unit, 1.0], dtype=torch.float32).repeat(4 * n) if unit != 1 else None
            for unit in units
        ]

    def __call__(self, blocks: Tensor) -> Tensor:
        """fp32 (2, 4 * n, 2), valid until the next call."""
        self.read(blocks)
        first, scales, minima, part = self.first, self.scales, self.minima, self.part
        # Those of the even and of the odd groups, scale and minimum in turn.
        torch.bitwise_and(scales, _LANES, out=self.even)
        self.even.bitwise_or_(torch.bitwise_left_shift(minima, _8, out=part).bitwise_and_(_ODD_LANES))
        torch.bitwise_right_shift(scales, _8, out=self.odd).bitwise_and_(_LANES)
        self.odd.bitwise_or_(torch.bitwise_and(minima, _ODD_LANES, out=part))
        self.numbers.view(-1).copy_(self.bytes.view(-1))
        # d and -dmin, twice in a word and then twice again.
        first.bitwise_and_(_HALVES).bitwise_xor_(_SIGN_OF_SECOND).mul_(_TWICE)
        self.halves.copy_(first.view(torch.float16))
        for twice in self.repeat_to:
            twice.copy_(self.repeat_from)
        self.numbers.mul_(self.repeated)
        for numbers, unit in zip(self.numbers.unbind(0), self.units, strict=True):
            if unit is not None:
                numbers.mul_(unit)
        return self.numbers.view(2, -1, 2)


class _SixBitScalesInOrder(_SixBitNumbers):
    """The same in the order of the groups."""

    def __init__(self, n: int, units: Sequence[float]) -> None:
        super().__init__(n)
        halves = torch.empty((2, n, 2), dtype=torch.int64)
        self.repeated_d, self.repeated_dmin = halves.unbind(0)
        self.halves = halves.view(-1).view(torch.float16)
        self.repeated = torch.empty(16 * n, dtype=torch.float32)
        self.bytes = self.both.view(-1).view(torch.uint8)
        self.numbers = torch.empty(16 * n, dtype=torch.float32)
        self.planes = self.numbers.view(2, 1, -1).unbind(0)
        self.units = torch.tensor(units, dtype=torch.float32).repeat(4 * n)
        self.means = torch.empty((1, 8 * n), dtype=torch.float32)

    def __call__(self, blocks: Tensor) -> tuple[Tensor, ...] | None:
        """What `HalfChunkUnpacker.unpack` takes, valid until the next call."""
        self.read(blocks)
        self.numbers.copy_(self.bytes)
        # d and -dmin, four times in a word, in two words: long rows instead of one of eight for each block.
        torch.bitwise_and(self.first, _HALF, out=self.part).mul_(_FOUR_TIMES)
        torch.bitwise_right_shift(self.first, _16, out=self.first).bitwise_and_(_HALF)
        self.first.bitwise_xor_(_SIGN).mul_(_FOUR_TIMES)
        for word, repeated in ((self.part, self.repeated_d), (self.first, self.repeated_dmin)):
            for column in repeated.unbind(1):
                column.copy_(word)
        self.numbers.mul_(self.repeated.copy_(self.halves))
        scales, minima = self.planes
        scales.mul_(self.units)
        means(scales, self.means)
        # A scale that is infinite or no number has none; then the sum is not zero.
        return (scales, minima, self.means) if self.means.sum().item() == 0 else None


class _Groups32(ChunkUnpacker):
    """Every 32 bytes hold two groups, of the low and of the high nibbles."""

    width, planes, parts = 32, 2, 2
    units: tuple[float, ...]

    def __init__(self, blocks: int) -> None:
        super().__init__((2, blocks, 16))
        self.six_bit_scales = _SixBitScales(0, self.units)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...] | None:
        if self.six_bit_scales.n != blocks.shape[0]:
            self.six_bit_scales = _SixBitScales(blocks.shape[0], self.units)
        return self.six_bit_scales(blocks).split(1, 2)


class Q4_K(_Groups32):
    units = (1, 1 / 16)

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.masks = byte_masks(0x0F, 0xF0)

    def read(self, blocks: Tensor) -> Sequence[Tensor]:
        nibbles = blocks.view(torch.int64)[:, 2:]
        for mask, plane in zip(self.masks, self.words.unbind(0), strict=True):
            torch.bitwise_and(nibbles, mask, out=plane)
        return self.parts_of_bytes


class Q5_K(_Groups32):
    units = (1 / 8, 1 / 8)

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.low, self.high = self.words.unbind(0)
        self.fifth = torch.empty((blocks, 16), dtype=torch.int64)
        self.fifth_halves = self.fifth.view(torch.complex128).unbind(1)
        self.tops = torch.empty_like(self.fifth)
        # Plane j has its fifth bits at bit j: to the top of the byte.
        shifts = torch.tensor([7, 5, 3, 1]).repeat_interleave(4)
        self.shifts = (shifts, shifts - 1)
        self.four, self.top = byte_masks(0x78, 0x80)
        self.one, self.three = kept_numbers(1, 3)

    def read(self, blocks: Tensor) -> Sequence[Tensor]:
        nibbles = blocks.view(torch.int64)[:, 6:]
        # 16 bytes at a time: of shorter ones there would be more, and rows of 32 take longer.
        fifth = aligned(blocks, 16).view(torch.complex128)[:, 1:3].unbind(1)
        for number, half in enumerate(self.fifth_halves):
            half.copy_(fifth[number % 2])
        torch.bitwise_left_shift(nibbles, self.three, out=self.low)
        torch.bitwise_right_shift(nibbles, self.one, out=self.high)
        for shift, plane in zip(self.shifts, self.words.unbind(0), strict=True):
            torch.bitwise_left_shift(self.fifth, shift, out=self.tops).bitwise_and_(self.top)
            plane.bitwise_and_(self.four).bitwise_or_(self.tops)
        return self.parts_of_bytes


class _HalfGroups32(HalfChunkUnpacker, _Groups32):
    """Its products have 21 or 22 bits."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.units = tuple(unit * self.UNIT for unit in self.units)
        self.scales_in_order = _SixBitScalesInOrder(0, self.units)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...] | None:
        if self.scales_in_order.n != blocks.shape[0]:
            self.scales_in_order = _SixBitScalesInOrder(blocks.shape[0], self.units)
        return self.scales_in_order(blocks)


class Q4_KToHalf(_HalfGroups32, Q4_K):
    pass


class Q5_KToHalf(_HalfGroups32, Q5_K):
    pass


# -- Q2_K, Q3_K and Q6_K: groups of 16 -----------------------------------------------------------------------


class _Groups16(ChunkUnpacker):
    """A half super-block is four planes of two groups, which lie together in the result."""

    width, planes, parts = 32, 4, 1


(_NIBBLES,) = byte_masks(0x0F)
_PAIRS_TO_BOTTOM = torch.stack(kept_numbers(0, 16, 32, 48))[:, None]


def _pairs(words: Tensor) -> Tensor:
    """A byte for each group of n half super-blocks: fp32 (4, 2 * n), those of a plane beside each other."""
    return (words >> _PAIRS_TO_BOTTOM).short().view(torch.uint8).float()


class Q6_K(_Groups16):
    """Here two planes of four groups: the low nibbles of a half's 64 bytes are its first four, one after the
    other."""

    width, planes, parts = 64, 2, 2
    signed = True

    def __init__(self, blocks: int) -> None:
        super().__init__((2, blocks, 16))
        self.low, self.high = self.words.unbind(0)
        self.nibbles = torch.empty((blocks, 16), dtype=torch.int64)
        self.nibble_fields = self.nibbles.view(torch.int16)
        # A half's pairs of bits belong to 32 bytes' low nibbles, the next 32's, and both's high nibbles.
        self.pair_fields = torch.empty((blocks, 32), dtype=torch.int16)
        self.pairs_of_half = as_words(self.pair_fields).view(2 * blocks, 4)
        self.pairs = torch.empty((blocks, 16), dtype=torch.int64)
        self.pairs_of_columns = self.pairs.view(2 * blocks, 2, 4).unbind(1)
        self.tops = torch.empty_like(self.pairs)
        shifts = torch.tensor([6, 4]).repeat_interleave(4).repeat(2)
        self.shifts = (shifts, shifts - 4)
        (self.two_bits,) = kept_numbers(2)
        self.flip, self.four, self.two = byte_masks(0xAA, 0x3C, 0xC0)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        # Of the low nibbles four, of the high ones four.
        small = blocks.view(torch.int16)[:, 96:104].contiguous().view(torch.int32)
        signed = torch.stack(small.view(-1, 2).unbind(1)).view(torch.int8).float()
        return (signed.mul_(_repeated_half(blocks, 208, 8).mul_(1 / 4))[:, :, None],)

    def read(self, blocks: Tensor) -> Sequence[Tensor]:
        nibbles, pairs, _ = blocks.view(torch.int16).split((64, 32, 9), 1)
        self.nibble_fields.copy_(nibbles)
        self.pair_fields.copy_(pairs)
        # With the top bit of every pair flipped, q * 4 read as signed is (q - 32) * 4.
        self.pairs_of_half.bitwise_xor_(self.flip)
        for of_column in self.pairs_of_columns:
            of_column.copy_(self.pairs_of_half)
        torch.bitwise_left_shift(self.nibbles, self.two_bits, out=self.low)
        torch.bitwise_right_shift(self.nibbles, self.two_bits, out=self.high)
        for shift, plane in zip(self.shifts, self.words.unbind(0), strict=True):
            torch.bitwise_left_shift(self.pairs, shift, out=self.tops).bitwise_and_(self.two)
            plane.bitwise_and_(self.four).bitwise_or_(self.tops)
        return self.parts_of_bytes


class Q2_K(_Groups16):
    def __init__(self, blocks: int) -> None:
        super().__init__((4, 8 * blocks))
        self.pairs = torch.empty((blocks, 16), dtype=torch.int32)
        self.pair_words = as_words(self.pairs)
        self.masks = byte_masks(0x03, 0x0C, 0x30, 0xC0)
        self.units = torch.tensor([1, 1 / 4, 1 / 16, 1 / 64], dtype=torch.float32)[:, None]

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        small = as_words(blocks.view(torch.int32)[:, :4].contiguous())
        scales = _pairs(small & _NIBBLES).mul_(_repeated_half(blocks, 80, 4)).mul_(self.units)
        minima = _pairs((small >> _4).bitwise_and_(_NIBBLES)).mul_(_repeated_half(blocks, 82, 4).neg_())
        return scales[:, :, None], minima[:, :, None]

    def read(self, blocks: Tensor) -> Sequence[Tensor]:
        self.pairs.copy_(blocks.view(torch.int32)[:, 4:20])
        for mask, plane in zip(self.masks, self.planes_of_words, strict=True):
            torch.bitwise_and(self.pair_words, mask, out=plane)
        return self.parts_of_bytes


class Q3_K(_Groups16):
    signed = True

    def __init__(self, blocks: int) -> None:
        super().__init__((4, 8 * blocks))
        self.pairs = torch.empty((blocks, 64), dtype=torch.uint8)
        self.pair_words = as_words(self.pairs)
        self.third = torch.empty((blocks, 32), dtype=torch.uint8)
        self.third_words = as_words(self.third).view(blocks, 4)
        third_of_halves = torch.empty((blocks, 2, 4), dtype=torch.int64)
        self.third_of_half = third_of_halves.unbind(1)
        self.third_rows = third_of_halves.view(-1)
        self.tops = torch.empty_like(self.third_rows)
        self.pair_shifts = kept_numbers(5, 3, 1, 1)
        self.shifts = kept_numbers(7, 6, 5, 4)
        self.two, self.top = byte_masks(0x60, 0x80)

    def scales(self, blocks: Tensor) -> tuple[Tensor, ...]:
        n = blocks.shape[0]
        low = as_words(blocks[:, 96:104].contiguous())
        top = blocks[:, 104:108].contiguous().view(torch.int32).view(-1).long()
        small = torch.empty((n, 2), dtype=torch.int64)
        for half, of_half in enumerate(small.unbind(1)):
            tops = ((top >> (4 * half + 2)) & 0x03030303).bitwise_left_shift_(32)
            tops.bitwise_or_((top >> 4 * half) & 0x03030303)
            four = (low >> 4 * half).bitwise_and_(every_byte(0x0F))
            torch.bitwise_or(four, tops << 4, out=of_half)
        six = _pairs(small.view(-1)).sub_(32)
        return (six.mul_(_repeated_half(blocks, 108, 4).mul_(1 / 32))[:, :, None],)

    def read(self, blocks: Tensor) -> Sequence[Tensor]:
        third, pairs = blocks[:, :96].split((32, 64), 1)
        self.pairs.copy_(pairs)
        # Flipped, as the top bit of a byte read as signed, it takes 4 off where it was clear.
        self.third.copy_(third)
        torch.bitwise_not(self.third_words, out=self.third_of_half[0])
        torch.bitwise_right_shift(self.third_of_half[0], 4, out=self.third_of_half[1])
        for number, plane in enumerate(self.planes_of_words):
            shift_pairs = torch.bitwise_left_shift if number < 3 else torch.bitwise_right_shift
            shift_pairs(self.pair_words, self.pair_shifts[number], out=plane).bitwise_and_(self.two)
            torch.bitwise_left_shift(self.third_rows, self.shifts[number], out=self.tops)
            plane.bitwise_or_(self.tops.bitwise_and_(self.top))
        return self.parts_of_bytes

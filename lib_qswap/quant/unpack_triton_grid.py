"""Triton's IQ1, IQ2 and IQ3 types. Layouts: `unpack_grid`; arguments: `unpack_triton`.

A block is 32 rows of 8 elements, a thread's unit: all that a row needs is loaded and computed where the row
is, some of it in several threads, so that none waits for another. Rows lie as (4, TILE, 8), by the stripes of
a block, and a thread has one of every stripe. Every row is a group of its own, with its scale.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import iq_grids
from .iq_grids import Grid, grid_rows
from .unpack_triton import bits_to_bytes, half, kernel, load_each, signed, spread


@triton.jit
def _places():
    """Where a row is: the number of its stripe, int32 (4, 1, 1), and its number in that, (1, 1, 8)."""
    return tl.arange(0, 4)[:, None, None], tl.arange(0, 8)[None, None, :]


@triton.jit
def _numbers(pointers):
    """As `load_each`, int32."""
    return load_each(pointers).to(tl.int32)


@triton.jit
def _in_halves(data, width: tl.constexpr):
    """(4, TILE, 8) -> uint32 (4, TILE, 8, 2): from the lowest bit on, then from bit `width` on."""
    return (data[:, :, :, None] >> (tl.arange(0, 2) * width)[None, None, None, :]).to(tl.uint32)


@triton.jit
def _by_block(words, scales, TILE: tl.constexpr):
    """Words of signed bytes, uint32 (4, TILE, 8, 2), and scales, (4, TILE, 8) -> what a type returns."""
    numbers = tl.permute(signed(spread(words)), (1, 0, 2, 3, 4))
    return tl.reshape(numbers, (TILE, 32, 8)), tl.reshape(tl.permute(scales, (1, 0, 2)), (TILE, 32))


@triton.jit
def _with_signs(words, low, high):
    """Words of bytes 1 to 127, (4, TILE, 8, 2), and 4 signs for each of the two, int32 (4, TILE, 8): negative
    where a bit is set."""
    minus = bits_to_bytes(tl.join(low, high).to(tl.uint32))
    return (words ^ (minus * 0xFF)) + minus


@triton.jit
def _with_seven_signs(words, signs):
    """7 signs in the lowest bits; the eighth makes the number of set bits even."""
    low, high = signs & 15, (signs >> 4) & 7
    # Bit n of 0x6996: whether the number of bits that are set in n is odd.
    return _with_signs(words, low, high | (((0x6996 << 3) >> (low ^ high)) & 8))


@triton.jit
def _odd(data, shift, mask: tl.constexpr):
    """2 * n + 1, fp32, of the n whose lowest bit is at `shift`, 1 or more; mask: 2 * the largest n."""
    return (((data >> (shift - 1)) & mask) | 1).to(tl.float32)


def _rows(grid: Grid, device: torch.device) -> Tensor:
    """int64 or int32: the entries of every row, a byte each."""
    return grid_rows(grid, device, torch.int64 if grid.width == 8 else torch.int32)


@triton.jit
def _rows_of_8(table, index):
    """int32 (4, TILE, 8) -> words (4, TILE, 8, 2)."""
    return _in_halves(load_each(table + index), 32)


@triton.jit
def _rows_of_4(table, first, second):
    """Two for each row of 8; int32 (4, TILE, 8) each -> words (4, TILE, 8, 2)."""
    return tl.join(load_each(table + first), load_each(table + second)).to(tl.uint32)


@kernel(alignment=2, table=partial(_rows, iq_grids.IQ2_XXS), stripes=4)
def IQ2_XXS(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    stripe, row = _places()
    start = (packed + blocks * 66)[None, :, None]
    halves = packed.to(tl.pointer_type(tl.uint16)) + blocks * 33
    group = halves[None, :, None] + stripe * 8 + row // 4 * 4
    index = _numbers(start + 2 + stripe * 16 + row // 4 * 8 + row % 4)
    top = _numbers(group + 4)
    signs = (_numbers(group + 3) | (top << 16)) >> (row % 4 * 7)
    scales = _odd(top, 12, 30) * (half(tl.load(halves), DTYPE) * 0.125)[None, :, None]
    return _by_block(_with_seven_signs(_rows_of_8(table, index), signs), scales, TILE)


@triton.jit
def _iq2_scales(start, d):
    """From pointers (1, TILE, 1) to a nibble for every two rows, and fp32 (TILE,): the rows' scales."""
    stripe, row = _places()
    nibbles = _numbers(start + stripe * 2 + row // 4)
    return _odd(nibbles * 2, row // 2 % 2 * 4 + 1, 30) * (d * 0.125)[None, :, None]


@kernel(alignment=2, table=partial(_rows, iq_grids.IQ2_XS), stripes=4)
def IQ2_XS(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    stripe, row = _places()
    start = (packed + blocks * 74)[None, :, None]
    halves = packed.to(tl.pointer_type(tl.uint16)) + blocks * 37
    pairs = _numbers(halves[None, :, None] + 1 + stripe * 8 + row)
    scales = _iq2_scales(start + 66, half(tl.load(halves), DTYPE))
    words = _with_seven_signs(_rows_of_8(table, pairs & 511), pairs >> 9)
    return _by_block(words, scales, TILE)


@kernel(alignment=2, table=partial(_rows, iq_grids.IQ2_S), stripes=4)
def IQ2_S(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    stripe, row = _places()
    start = (packed + blocks * 82)[None, :, None]
    tops = _numbers(start + 66 + stripe * 2 + row // 4) << (8 - row % 4 * 2)
    index = _numbers(start + 2 + stripe * 8 + row) | (tops & 0x300)
    signs = _numbers(start + 34 + stripe * 8 + row)
    d = half(tl.load(packed.to(tl.pointer_type(tl.uint16)) + blocks * 41), DTYPE)
    words = _with_signs(_rows_of_8(table, index), signs & 15, signs >> 4)
    return _by_block(words, _iq2_scales(start + 74, d), TILE)


@kernel(alignment=2, table=partial(_rows, iq_grids.IQ3_XXS), stripes=4)
def IQ3_XXS(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    stripe, row = _places()
    halves = packed.to(tl.pointer_type(tl.uint16)) + blocks * 49
    start = halves[None, :, None]
    group = start + stripe * 4 + row // 4 * 2
    pairs = _numbers(start + 1 + stripe * 8 + row)
    top = _numbers(group + 34)
    signs = (_numbers(group + 33) | (top << 16)) >> (row % 4 * 7)
    scales = _odd(top, 12, 30) * (half(tl.load(halves), DTYPE) * 0.25)[None, :, None]
    words = _with_seven_signs(_rows_of_4(table, pairs & 255, pairs >> 8), signs)
    return _by_block(words, scales, TILE)


@kernel(alignment=2, table=partial(_rows, iq_grids.IQ3_S), stripes=4)
def IQ3_S(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    stripe, row = _places()
    start = (packed + blocks * 110)[None, :, None]
    halves = packed.to(tl.pointer_type(tl.uint16)) + blocks * 55
    pairs = _numbers(halves[None, :, None] + 1 + stripe * 8 + row)
    tops = _numbers(start + 66 + stripe * 2 + row // 4) << (8 - row % 4 * 2)
    first, second = (pairs & 255) | (tops & 256), (pairs >> 8) | ((tops >> 1) & 256)
    signs = _numbers(start + 74 + stripe * 8 + row)
    nibbles = _numbers(start + 106 + stripe + row // 8)
    scales = _odd(nibbles * 2, row // 4 * 4 + 1, 30) * half(tl.load(halves), DTYPE)[None, :, None]
    words = _with_signs(_rows_of_4(table, first, second), signs & 15, signs >> 4)
    return _by_block(words, scales, TILE)


@lru_cache(maxsize=16)
def _iq1_codes(device: torch.device) -> Tensor:
    """int32 (2048,): of the entries of a row, in eighths and once with 1 more, once with 1 less, what tells
    them apart: bits 3 and 4. A byte has those of an entry in its highest bits, more and less, then those of
    the entry 4 further."""
    rows = grid_rows(iq_grids.IQ1, torch.device("cpu"), torch.int64).view(torch.int8).view(-1, 8).int() * 8
    more, less = (rows + 1) >> 3 & 3, (rows - 1) >> 3 & 3
    codes = more[:, :4] << 6 | less[:, :4] << 4 | more[:, 4:] << 2 | less[:, 4:]
    return codes.to(torch.uint8).view(torch.int32).view(-1).to(device)


@triton.jit
def _iq1(table, index, minus):
    """Rows of 8 of -1, 0 and 1, with 1/8 added, or taken off where `minus` is 1, not 0; int32 (4, TILE, 8)
    each -> words (4, TILE, 8, 2), in 64ths."""
    codes = load_each(table + index).to(tl.uint32) << (minus * 2)
    codes = codes[:, :, :, None] << (tl.arange(0, 2) * 4)[None, None, None, :]
    # Below its code, every number has the bits of 1 or of -1, in eighths.
    rest = 0x08080808 + minus * 0x30303030
    return (codes & 0xC0C0C0C0) | rest.to(tl.uint32)[:, :, :, None]


@kernel(alignment=2, table=_iq1_codes, stripes=4)
def IQ1_S(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    stripe, row = _places()
    start = (packed + blocks * 50)[None, :, None]
    halves = packed.to(tl.pointer_type(tl.uint16)) + blocks * 25
    high = _numbers(halves[None, :, None] + 17 + stripe * 2 + row // 4)
    index = _numbers(start + 2 + stripe * 8 + row) | (((high >> (row % 4 * 3)) & 7) << 8)
    scales = _odd(high, 12, 14) * (half(tl.load(halves), DTYPE) * 0.015625)[None, :, None]
    return _by_block(_iq1(table, index, high >> 15), scales, TILE)


@kernel(alignment=4, table=_iq1_codes, stripes=4)
def IQ1_M(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    stripe, row = _places()
    start = (packed + blocks * 56)[None, :, None]
    words = packed.to(tl.pointer_type(tl.uint32)) + blocks * 14
    first, second = tl.load(words + 12), tl.load(words + 13)
    d = ((first >> 12) & 0x000F) | ((first >> 24) & 0x00F0)
    d = d | ((second >> 4) & 0x0F00) | ((second >> 16) & 0xF000)
    halves = packed.to(tl.pointer_type(tl.uint16)) + blocks * 28
    small = _numbers(halves[None, :, None] + 24 + stripe + row // 8)
    scales = _odd(small * 2, row // 2 * 3 + 1, 14) * (half(d.to(tl.uint16), DTYPE) * 0.015625)[None, :, None]
    nibbles = _numbers(start + 32 + stripe * 4 + row // 2) >> (row % 2 * 4)
    index = _numbers(start + stripe * 8 + row) | ((nibbles & 7) << 8)
    return _by_block(_iq1(table, index, (nibbles >> 3) & 1), scales, TILE)

"""Triton's IQ1, IQ2 and IQ3 types. Layouts: `unpack_grid`; arguments: `unpack_triton`.

The tables are the lattices as `iq_grids` keeps them, 16 bits a row, so that they stay in the nearest cache:
an entry's position in the list of values gives its value by arithmetic.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from . import iq_grids
from .unpack_triton import half, kernel, spread, word_at


@triton.jit
def _scaled(values, scales, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """A number for each of 256 elements times its group's scale (TILE, GROUPS)."""
    values = tl.reshape(values.to(tl.float32), (TILE, GROUPS, 256 // GROUPS))
    return tl.reshape(values * scales[:, :, None], (TILE, 256))


@triton.jit
def _with_signs(values, signs, bit):
    """Integers, negated where that bit of `signs` is set."""
    minus = (signs >> bit) & 1
    return (values ^ -minus) + minus


@triton.jit
def _eighth_sign(signs):
    """7 stored bits and the eighth, which makes the number of set bits even."""
    fold = signs ^ (signs >> 4)
    fold = fold ^ (fold >> 2)
    return signs | (((fold ^ (fold >> 1)) & 1) << 7)


@triton.jit
def _nibbles(start, element, offset):
    """The low, then the high nibbles of the bytes at `offset` of every block, as fp32."""
    data = tl.load(start[:, None] + offset + (element // 2)[None, :])
    return ((data >> (element % 2 * 4).to(tl.uint8)[None, :]) & 15).to(tl.float32)


@triton.jit
def _iq2(table, index, signs):
    """Rows of 8 of 8, 25 and 43; int32 (n, 32) each -> int32 (n, 32, 8)."""
    entry = tl.arange(0, 8)[None, None, :]
    position = (tl.load(table + index).to(tl.int32)[:, :, None] >> (entry * 2)) & 3
    return _with_signs(position * 17 + 8 + (position >> 1), signs[:, :, None], entry)


@kernel(alignment=2, table=partial(iq_grids.stored_rows, iq_grids.IQ2_XXS))
def IQ2_XXS(packed, table, blocks, TILE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 33
    group = start[:, None] + 1 + tl.arange(0, 8)[None, :] * 4
    index = tl.reshape(spread(word_at(group)), (TILE, 32)).to(tl.int32)
    high = word_at(group + 2)
    scales = ((high >> 28).to(tl.float32) + 0.5) * (half(tl.load(start)) * 0.25)[:, None]
    signs = (high[:, :, None] >> (tl.arange(0, 4) * 7)[None, None, :]) & 127
    signs = _eighth_sign(tl.reshape(signs, (TILE, 32)).to(tl.int32))
    return _scaled(_iq2(table, index, signs), scales, TILE, 8)


@kernel(alignment=2, table=partial(iq_grids.stored_rows, iq_grids.IQ2_XS))
def IQ2_XS(packed, table, blocks, TILE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 37
    pairs = tl.load(start[:, None] + 1 + tl.arange(0, 32)[None, :]).to(tl.int32)
    small = _nibbles(packed + blocks * 74, tl.arange(0, 16), 66)
    scales = (small + 0.5) * (half(tl.load(start)) * 0.25)[:, None]
    return _scaled(_iq2(table, pairs & 511, _eighth_sign(pairs >> 9)), scales, TILE, 16)


@kernel(alignment=2, table=partial(iq_grids.stored_rows, iq_grids.IQ2_S))
def IQ2_S(packed, table, blocks, TILE: tl.constexpr):
    start = packed + blocks * 82
    row = tl.arange(0, 32)
    tops = tl.load(start[:, None] + 66 + (row // 4)[None, :]).to(tl.int32) >> (row % 4 * 2)[None, :]
    index = tl.load(start[:, None] + 2 + row[None, :]).to(tl.int32) | ((tops & 3) << 8)
    signs = tl.load(start[:, None] + 34 + row[None, :]).to(tl.int32)
    d = half(tl.load(packed.to(tl.pointer_type(tl.uint16)) + blocks * 41))
    scales = (_nibbles(start, tl.arange(0, 16), 74) + 0.5) * (d * 0.25)[:, None]
    return _scaled(_iq2(table, index, signs), scales, TILE, 16)


@triton.jit
def _iq3_positions(table, index):
    """Rows of 4; int32 (n, 32, 2) -> positions in the list of values, int32 (n, 32, 2, 4)."""
    entry = tl.arange(0, 4)[None, None, None, :]
    return (tl.load(table + index).to(tl.int32)[:, :, :, None] >> (entry * 4)) & 15


@triton.jit
def _with_pairs_of_signs(values, signs):
    """int32 (n, 32, 2, 4) with the signs of int32 (n, 32), a bit for each of 8 elements."""
    bit = tl.arange(0, 2)[:, None] * 4 + tl.arange(0, 4)[None, :]
    return _with_signs(values, signs[:, :, None, None], bit[None, None, :, :])


@kernel(alignment=2, table=partial(iq_grids.stored_rows, iq_grids.IQ3_XXS))
def IQ3_XXS(packed, table, blocks, TILE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 49
    high = word_at(start[:, None] + 33 + tl.arange(0, 8)[None, :] * 2)
    scales = ((high >> 28).to(tl.float32) + 0.5) * (half(tl.load(start)) * 0.5)[:, None]
    signs = (high[:, :, None] >> (tl.arange(0, 4) * 7)[None, None, :]) & 127
    signs = _eighth_sign(tl.reshape(signs, (TILE, 32)).to(tl.int32))
    row = tl.arange(0, 32)[:, None] * 2 + tl.arange(0, 2)[None, :]
    index = tl.load(packed + (blocks * 98)[:, None, None] + 2 + row[None, :, :]).to(tl.int32)
    position = _iq3_positions(table, index)
    # 4, 12, 20, 28, 36, 44, 52, and 62 at position 7.
    values = position * 8 + 4 + ((position + 1) >> 3) * 2
    return _scaled(_with_pairs_of_signs(values, signs), scales, TILE, 8)


@kernel(alignment=2, table=partial(iq_grids.stored_rows, iq_grids.IQ3_S))
def IQ3_S(packed, table, blocks, TILE: tl.constexpr):
    start = packed + blocks * 110
    row = tl.arange(0, 32)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tops = tl.load(start[:, None, None] + 66 + (row // 8)[None, :, :]).to(tl.int32) >> (row % 8)[None, :, :]
    index = tl.load(start[:, None, None] + 2 + row[None, :, :]).to(tl.int32) | ((tops & 1) << 8)
    signs = tl.load(start[:, None] + 74 + tl.arange(0, 32)[None, :]).to(tl.int32)
    d = half(tl.load(packed.to(tl.pointer_type(tl.uint16)) + blocks * 55))
    scales = (_nibbles(start, tl.arange(0, 8), 106) * 2 + 1) * d[:, None]
    values = _iq3_positions(table, index) * 2 + 1
    return _scaled(_with_pairs_of_signs(values, signs), scales, TILE, 8)


@triton.jit
def _iq1(table, index, minus):
    """Rows of 8 of -1, 0 and 1 with 1/8 added, or taken off where `minus` is 1: in eighths."""
    position = tl.load(table + index).to(tl.int32)[:, :, None] >> (tl.arange(0, 8) * 2)[None, None, :]
    return (position & 3) * 8 - 7 - 2 * minus[:, :, None]


@kernel(alignment=2, table=partial(iq_grids.stored_rows, iq_grids.IQ1))
def IQ1_S(packed, table, blocks, TILE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 25
    high = tl.load(start[:, None] + 17 + tl.arange(0, 8)[None, :]).to(tl.int32)
    scales = (((high >> 12) & 7).to(tl.float32) * 2 + 1) * (half(tl.load(start)) * 0.125)[:, None]
    row = tl.arange(0, 32)
    high = tl.load(start[:, None] + 17 + (row // 4)[None, :]).to(tl.int32)
    index = tl.load(packed + (blocks * 50)[:, None] + 2 + row[None, :]).to(tl.int32)
    index = index | (((high >> (row % 4 * 3)[None, :]) & 7) << 8)
    return _scaled(_iq1(table, index, high >> 15), scales, TILE, 8)


@kernel(alignment=4, table=partial(iq_grids.stored_rows, iq_grids.IQ1))
def IQ1_M(packed, table, blocks, TILE: tl.constexpr):
    words = packed.to(tl.pointer_type(tl.uint32)) + blocks * 14
    first, second = tl.load(words + 12), tl.load(words + 13)
    d = ((first >> 12) & 0x000F) | ((first >> 24) & 0x00F0)
    d = d | ((second >> 4) & 0x0F00) | ((second >> 16) & 0xF000)
    group = tl.arange(0, 16)
    high = tl.load(packed.to(tl.pointer_type(tl.uint16)) + (blocks * 28)[:, None] + 24 + (group // 4)[None, :])
    small = (high.to(tl.int32) >> (group % 4 * 3)[None, :]) & 7
    scales = (small.to(tl.float32) * 2 + 1) * (half(d.to(tl.uint16)) * 0.125)[:, None]
    row = tl.arange(0, 32)
    start = packed + (blocks * 56)[:, None]
    nibbles = tl.load(start + 32 + (row // 2)[None, :]).to(tl.int32) >> (row % 2 * 4)[None, :]
    index = tl.load(start + row[None, :]).to(tl.int32) | ((nibbles & 7) << 8)
    return _scaled(_iq1(table, index, (nibbles >> 3) & 1), scales, TILE, 16)

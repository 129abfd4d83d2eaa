"""Triton's IQ1, IQ2 and IQ3 types. Layouts: `unpack_grid`; arguments: `unpack_triton`.

The tables are the lattices as `iq_grids` keeps them, 16 bits a row, so that they stay in the nearest cache:
an entry's position in the list of values gives its value by arithmetic.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from . import iq_grids
from .unpack_triton import bits_to_bytes, half, kernel, signed, spread, word_at


@triton.jit
def _grouped(values, scales, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """A number for each of 256 elements, and the scales (TILE, GROUPS) of their groups."""
    return tl.reshape(values, (TILE, GROUPS, 256 // GROUPS)), scales


@triton.jit
def _in_halves(data, width: tl.constexpr):
    """int32 (n, 32) -> uint32 (n, 32, 2): from the lowest bit on, then from bit `width` on."""
    return data.to(tl.uint32)[:, :, None] >> (tl.arange(0, 2) * width)[None, None, :]


@triton.jit
def _with_signs(words, signs):
    """Words of bytes 1 to 127 (n, 32, 2), signs int32 (n, 32) -> fp32 (n, 32, 2, 4), negative where a bit is
    set."""
    minus = bits_to_bytes(_in_halves(signs, 4) & 15)
    return signed(spread((words ^ (minus * 0xFF)) + minus))


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
def _two_bit_rows(table, index):
    """The positions in rows of 8: int32 (n, 32) -> uint32 (n, 32, 2), a byte each."""
    rows = _in_halves(tl.load(table + index), 8) & 0xFF
    rows = (rows | (rows << 12)) & 0x000F000F
    return (rows | (rows << 6)) & 0x03030303


@triton.jit
def _four_bit_rows(table, index):
    """The positions in rows of 4: int32 -> uint32 of the same shape, a byte each."""
    rows = tl.load(table + index).to(tl.uint32) & 0xFFFF
    rows = (rows | (rows << 8)) & 0x00FF00FF
    return (rows | (rows << 4)) & 0x0F0F0F0F


@triton.jit
def _iq2(table, index, signs):
    """Rows of 8 of 8, 25 and 43; int32 (n, 32) each -> fp32 (n, 32, 2, 4)."""
    position = _two_bit_rows(table, index)
    return _with_signs(position * 17 + 0x08080808 + ((position >> 1) & 0x01010101), signs)


@kernel(alignment=2, table=partial(iq_grids.stored_rows, iq_grids.IQ2_XXS))
def IQ2_XXS(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 33
    group = start[:, None] + 1 + tl.arange(0, 8)[None, :] * 4
    index = tl.reshape(spread(word_at(group)), (TILE, 32)).to(tl.int32)
    high = word_at(group + 2)
    scales = ((high >> 28).to(tl.float32) + 0.5) * (half(tl.load(start), DTYPE) * 0.25)[:, None]
    signs = (high[:, :, None] >> (tl.arange(0, 4) * 7)[None, None, :]) & 127
    signs = _eighth_sign(tl.reshape(signs, (TILE, 32)).to(tl.int32))
    return _grouped(_iq2(table, index, signs), scales, TILE, 8)


@kernel(alignment=2, table=partial(iq_grids.stored_rows, iq_grids.IQ2_XS))
def IQ2_XS(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 37
    pairs = tl.load(start[:, None] + 1 + tl.arange(0, 32)[None, :]).to(tl.int32)
    small = _nibbles(packed + blocks * 74, tl.arange(0, 16), 66)
    scales = (small + 0.5) * (half(tl.load(start), DTYPE) * 0.25)[:, None]
    return _grouped(_iq2(table, pairs & 511, _eighth_sign(pairs >> 9)), scales, TILE, 16)


@kernel(alignment=2, table=partial(iq_grids.stored_rows, iq_grids.IQ2_S))
def IQ2_S(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed + blocks * 82
    row = tl.arange(0, 32)
    tops = tl.load(start[:, None] + 66 + (row // 4)[None, :]).to(tl.int32) >> (row % 4 * 2)[None, :]
    index = tl.load(start[:, None] + 2 + row[None, :]).to(tl.int32) | ((tops & 3) << 8)
    signs = tl.load(start[:, None] + 34 + row[None, :]).to(tl.int32)
    d = half(tl.load(packed.to(tl.pointer_type(tl.uint16)) + blocks * 41), DTYPE)
    scales = (_nibbles(start, tl.arange(0, 16), 74) + 0.5) * (d * 0.25)[:, None]
    return _grouped(_iq2(table, index, signs), scales, TILE, 16)


@kernel(alignment=2, table=partial(iq_grids.stored_rows, iq_grids.IQ3_XXS), tile_elements=1024, warps=1)
def IQ3_XXS(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 49
    high = word_at(start[:, None] + 33 + tl.arange(0, 8)[None, :] * 2)
    scales = ((high >> 28).to(tl.float32) + 0.5) * (half(tl.load(start), DTYPE) * 0.5)[:, None]
    signs = (high[:, :, None] >> (tl.arange(0, 4) * 7)[None, None, :]) & 127
    signs = _eighth_sign(tl.reshape(signs, (TILE, 32)).to(tl.int32))
    row = tl.arange(0, 32)[:, None] * 2 + tl.arange(0, 2)[None, :]
    index = tl.load(packed + (blocks * 98)[:, None, None] + 2 + row[None, :, :]).to(tl.int32)
    position = _four_bit_rows(table, index)
    # 4, 12, 20, 28, 36, 44, 52, and 62 at position 7.
    words = position * 8 + 0x04040404 + (((position + 0x01010101) >> 2) & 0x02020202)
    return _grouped(_with_signs(words, signs), scales, TILE, 8)


@kernel(alignment=2, table=partial(iq_grids.stored_rows, iq_grids.IQ3_S), tile_elements=1024, warps=1)
def IQ3_S(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed + blocks * 110
    row = tl.arange(0, 32)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tops = tl.load(start[:, None, None] + 66 + (row // 8)[None, :, :]).to(tl.int32) >> (row % 8)[None, :, :]
    index = tl.load(start[:, None, None] + 2 + row[None, :, :]).to(tl.int32) | ((tops & 1) << 8)
    signs = tl.load(start[:, None] + 74 + tl.arange(0, 32)[None, :]).to(tl.int32)
    d = half(tl.load(packed.to(tl.pointer_type(tl.uint16)) + blocks * 55), DTYPE)
    scales = (_nibbles(start, tl.arange(0, 8), 106) * 2 + 1) * d[:, None]
    words = _four_bit_rows(table, index) * 2 + 0x01010101
    return _grouped(_with_signs(words, signs), scales, TILE, 8)


@triton.jit
def _iq1(table, index, minus):
    """Rows of 8 of -1, 0 and 1, with 1/8 added, or taken off where `minus` is 1; in eighths, fp32
    (n, 32, 2, 4)."""
    words = _two_bit_rows(table, index) * 8 + 0x02020202 - (minus * 0x02020202).to(tl.uint32)[:, :, None]
    return spread(words).to(tl.float32) - 9


@kernel(alignment=2, table=partial(iq_grids.stored_rows, iq_grids.IQ1))
def IQ1_S(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 25
    high = tl.load(start[:, None] + 17 + tl.arange(0, 8)[None, :]).to(tl.int32)
    scales = (((high >> 12) & 7).to(tl.float32) * 2 + 1) * (half(tl.load(start), DTYPE) * 0.125)[:, None]
    row = tl.arange(0, 32)
    high = tl.load(start[:, None] + 17 + (row // 4)[None, :]).to(tl.int32)
    index = tl.load(packed + (blocks * 50)[:, None] + 2 + row[None, :]).to(tl.int32)
    index = index | (((high >> (row % 4 * 3)[None, :]) & 7) << 8)
    return _grouped(_iq1(table, index, high >> 15), scales, TILE, 8)


@kernel(alignment=4, table=partial(iq_grids.stored_rows, iq_grids.IQ1), tile_elements=1024, warps=1)
def IQ1_M(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    words = packed.to(tl.pointer_type(tl.uint32)) + blocks * 14
    first, second = tl.load(words + 12), tl.load(words + 13)
    d = ((first >> 12) & 0x000F) | ((first >> 24) & 0x00F0)
    d = d | ((second >> 4) & 0x0F00) | ((second >> 16) & 0xF000)
    group = tl.arange(0, 16)
    high = tl.load(
        packed.to(tl.pointer_type(tl.uint16)) + (blocks * 28)[:, None] + 24 + (group // 4)[None, :]
    )
    small = (high.to(tl.int32) >> (group % 4 * 3)[None, :]) & 7
    scales = (small.to(tl.float32) * 2 + 1) * (half(d.to(tl.uint16), DTYPE) * 0.125)[:, None]
    row = tl.arange(0, 32)
    start = packed + (blocks * 56)[:, None]
    nibbles = tl.load(start + 32 + (row // 2)[None, :]).to(tl.int32) >> (row % 2 * 4)[None, :]
    index = tl.load(start + row[None, :]).to(tl.int32) | ((nibbles & 7) << 8)
    return _grouped(_iq1(table, index, (nibbles >> 3) & 1), scales, TILE, 16)

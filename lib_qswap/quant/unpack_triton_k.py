"""Triton's K types. Layouts: `unpack_k`; arguments: `unpack_triton`."""

from __future__ import annotations

import triton
import triton.language as tl

from .unpack_triton import four_pairs, half, kernel, signed, spread, two_nibbles, word_at


@triton.jit
def _six_bits(start, group):
    """Q4_K's and Q5_K's scales and minima of the groups, fp32 (n, 8); start: of the super-blocks (n, 1)."""
    first = tl.load(start + 4 + group % 4)
    second = tl.load(start + 8 + group % 4)
    rest = tl.load(start + 12 + group % 4)
    scales = tl.where(group < 4, first & 63, (rest & 15) | ((first >> 6) << 4))
    minima = tl.where(group < 4, second & 63, (rest >> 4) | ((second >> 6) << 4))
    return scales.to(tl.float32), minima.to(tl.float32)


@kernel(alignment=4, offsets=-1)
def Q4_K(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    halves = packed.to(tl.pointer_type(tl.uint16)) + blocks * 72
    small, minima = _six_bits(packed + (blocks * 144)[:, None], tl.arange(0, 8)[None, :])
    scales = small * half(tl.load(halves), DTYPE)[:, None]
    minima = minima * half(tl.load(halves + 1), DTYPE)[:, None]
    start = packed.to(tl.pointer_type(tl.uint32)) + (blocks * 36)[:, None, None]
    words = tl.load(start + 4 + tl.arange(0, 4)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :])
    q = spread(two_nibbles(words)).to(tl.float32)
    return tl.reshape(q, (TILE, 8, 32)), scales, minima


@kernel(alignment=4, offsets=-1)
def Q5_K(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    halves = packed.to(tl.pointer_type(tl.uint16)) + blocks * 88
    small, minima = _six_bits(packed + (blocks * 176)[:, None], tl.arange(0, 8)[None, :])
    scales = small * half(tl.load(halves), DTYPE)[:, None]
    minima = minima * half(tl.load(halves + 1), DTYPE)[:, None]
    start = packed.to(tl.pointer_type(tl.uint32)) + (blocks * 44)[:, None, None]
    words = tl.load(start + 12 + tl.arange(0, 4)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :])
    fifth = tl.load(start + 4 + tl.arange(0, 8)[None, None, :])
    plane = tl.arange(0, 4)[:, None] * 2 + tl.arange(0, 2)[None, :]
    fifth = (fifth[:, :, None, :] >> plane[None, :, :, None]) & 0x01010101
    q = spread(two_nibbles(words) | (fifth << 4)).to(tl.float32)
    return tl.reshape(q, (TILE, 8, 32)), scales, minima


@kernel(alignment=2, tile_elements=1024)
def Q6_K(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 105
    small = signed(tl.load(packed + (blocks * 210)[:, None] + 192 + tl.arange(0, 16)[None, :]))
    scales = small * half(tl.load(start + 104), DTYPE)[:, None]
    two, word = tl.arange(0, 2), tl.arange(0, 8)[None, None, :] * 2
    start = start[:, None, None]
    # The two halves, then the two columns of 32 bytes, then the two nibbles.
    columns = tl.arange(0, 4)[None, :, None]
    nibbles = tl.reshape(word_at(start + columns * 16 + word), (TILE, 2, 1, 2, 8))
    nibbles = nibbles >> (two * 4)[None, None, :, None, None]
    pairs = four_pairs(word_at(start + 64 + two[None, :, None] * 16 + word))
    q = (tl.reshape(nibbles, (TILE, 2, 4, 8)) & 0x0F0F0F0F) | (pairs << 4)
    return tl.reshape(spread(q).to(tl.float32) - 32, (TILE, 16, 16)), scales


@kernel(alignment=4, offsets=-1)
def Q2_K(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    halves = packed.to(tl.pointer_type(tl.uint16)) + blocks * 42
    small = tl.load(packed + (blocks * 84)[:, None] + tl.arange(0, 16)[None, :])
    scales = (small & 15).to(tl.float32) * half(tl.load(halves + 40), DTYPE)[:, None]
    minima = (small >> 4).to(tl.float32) * half(tl.load(halves + 41), DTYPE)[:, None]
    start = packed.to(tl.pointer_type(tl.uint32)) + (blocks * 21)[:, None, None]
    words = tl.load(start + 4 + tl.arange(0, 2)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :])
    q = spread(four_pairs(words)).to(tl.float32)
    return tl.reshape(q, (TILE, 16, 16)), scales, minima


@kernel(alignment=2)
def Q3_K(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 55
    group = tl.arange(0, 16)[None, :]
    small = packed + (blocks * 110)[:, None] + 96
    low = (tl.load(small + group % 8) >> (group // 8 * 4).to(tl.uint8)) & 15
    top = (tl.load(small + 8 + group % 4) >> (group // 4 * 2).to(tl.uint8)) & 3
    scales = ((low | (top << 4)).to(tl.float32) - 32) * half(tl.load(start + 54), DTYPE)[:, None]
    start = start[:, None, None]
    word = tl.arange(0, 8)[None, None, :] * 2
    pairs = four_pairs(word_at(start + 16 + tl.arange(0, 2)[None, :, None] * 16 + word))
    plane = tl.arange(0, 2)[:, None] * 4 + tl.arange(0, 4)[None, :]
    third = word_at(start + word)[:, :, None, :] >> plane[None, :, :, None]
    q = spread(pairs | ((third & 0x01010101) << 2)).to(tl.float32) - 4
    return tl.reshape(q, (TILE, 16, 16)), scales


@kernel(alignment=4)
def Q8_K(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    scale = tl.load(packed.to(tl.pointer_type(tl.float32)) + blocks * 73)
    q = signed(tl.load(packed + (blocks * 292)[:, None] + 4 + tl.arange(0, 256)[None, :]))
    return q[:, None, :], scale[:, None]

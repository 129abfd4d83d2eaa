"""Triton's Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q1_0 and Q2_0.

Layouts: `unpack_legacy`; arguments: `unpack_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .unpack_triton import bits_to_bytes, half, kernel, signed, spread, two_nibbles, word_at


@triton.jit
def _fifth_bits(bits):
    """uint32 (n,), lowest bit first -> uint32 (n, 1, 2, 4): words of bytes that are 16 or 0."""
    four = tl.arange(0, 2)[:, None] * 16 + tl.arange(0, 4)[None, :] * 4
    return bits_to_bytes((bits[:, None, None, None] >> four[None, None, :, :]) & 15) << 4


@kernel(alignment=2)
def Q4_0(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 9
    words = word_at(start[:, None, None] + 1 + 2 * tl.arange(0, 4)[None, None, :])
    q = tl.reshape(spread(two_nibbles(words)), (TILE, 1, 32)).to(tl.float32) - 8
    return q, half(tl.load(start), DTYPE)[:, None]


@kernel(alignment=4, offsets=1)
def Q4_1(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 10
    words = packed.to(tl.pointer_type(tl.uint32)) + (blocks * 5)[:, None, None] + 1
    words = tl.load(words + tl.arange(0, 4)[None, None, :])
    q = tl.reshape(spread(two_nibbles(words)), (TILE, 1, 32)).to(tl.float32)
    return q, half(tl.load(start), DTYPE)[:, None], half(tl.load(start + 1), DTYPE)[:, None]


@kernel(alignment=2)
def Q5_0(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 11
    words = word_at(start[:, None, None] + 3 + 2 * tl.arange(0, 4)[None, None, :])
    words = two_nibbles(words) | _fifth_bits(word_at(start + 1))
    q = tl.reshape(spread(words), (TILE, 1, 32)).to(tl.float32) - 16
    return q, half(tl.load(start), DTYPE)[:, None]


@kernel(alignment=4, offsets=1)
def Q5_1(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 12
    words = packed.to(tl.pointer_type(tl.uint32)) + blocks * 6
    nibbles = tl.load(words[:, None, None] + 2 + tl.arange(0, 4)[None, None, :])
    words = two_nibbles(nibbles) | _fifth_bits(tl.load(words + 1))
    q = tl.reshape(spread(words), (TILE, 1, 32)).to(tl.float32)
    return q, half(tl.load(start), DTYPE)[:, None], half(tl.load(start + 1), DTYPE)[:, None]


@kernel(alignment=2)
def Q8_0(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    scale = half(tl.load(packed.to(tl.pointer_type(tl.uint16)) + blocks * 17), DTYPE)
    q = signed(tl.load(packed + (blocks * 34)[:, None] + 2 + tl.arange(0, 32)[None, :]))
    return q[:, None, :], scale[:, None]


@kernel(alignment=2)
def Q1_0(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    scale = half(tl.load(packed.to(tl.pointer_type(tl.uint16)) + blocks * 9), DTYPE)
    bits = tl.load(packed + (blocks * 18)[:, None] + 2 + tl.arange(0, 16)[None, :]).to(tl.int32)
    bits = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits * 2 - 1, (TILE, 1, 128)).to(tl.float32), scale[:, None]


@kernel(alignment=2)
def Q2_0(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    scale = half(tl.load(packed.to(tl.pointer_type(tl.uint16)) + blocks * 9), DTYPE)
    pairs = tl.load(packed + (blocks * 18)[:, None] + 2 + tl.arange(0, 16)[None, :]).to(tl.int32)
    pairs = (pairs[:, :, None] >> (tl.arange(0, 4) * 2)[None, None, :]) & 3
    return tl.reshape(pairs - 1, (TILE, 1, 64)).to(tl.float32), scale[:, None]

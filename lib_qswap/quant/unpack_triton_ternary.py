"""Triton's TQ1_0 and TQ2_0. Layouts: `unpack_ternary`; arguments: `unpack_triton`."""

from __future__ import annotations

import triton.language as tl

from .unpack_triton import four_pairs, half, kernel, spread, word_at


@kernel(alignment=2)
def TQ1_0(packed, table, blocks, TILE: tl.constexpr):
    scale = half(tl.load(packed.to(tl.pointer_type(tl.uint16)) + blocks * 27 + 26))
    element = tl.arange(0, 256)
    second, third = element - 160, element - 240
    byte = tl.where(third >= 0, 48 + third % 4, tl.where(second >= 0, 32 + second % 16, element % 32))
    digit = tl.where(third >= 0, third // 4, tl.where(second >= 0, second // 16, element // 32))
    power = tl.where(digit >= 2, 9, 1) * tl.where(digit % 2 == 1, 3, 1) * tl.where(digit >= 4, 9, 1)
    data = tl.load(packed + (blocks * 54)[:, None] + byte[None, :]).to(tl.int32)
    digits = (((data * power[None, :]) & 0xFF) * 3) >> 8
    return (digits - 1).to(tl.float32) * scale[:, None]


@kernel(alignment=2)
def TQ2_0(packed, table, blocks, TILE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 33
    words = start[:, None, None] + tl.arange(0, 2)[None, :, None] * 16 + tl.arange(0, 8)[None, None, :] * 2
    q = tl.reshape(spread(four_pairs(word_at(words))), (TILE, 256)).to(tl.float32) - 1
    return q * half(tl.load(start + 32))[:, None]

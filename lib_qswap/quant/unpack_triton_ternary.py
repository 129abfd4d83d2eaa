"""Triton's TQ1_0 and TQ2_0. Layouts: `unpack_ternary`; arguments: `unpack_triton`."""

from __future__ import annotations

import triton
import triton.language as tl

from .unpack_triton import four_pairs, half, kernel, spread, word_at


@triton.jit
def _first_digits(numbers):
    """Two bytes as numbers of 16 bits each -> their first base-3 digits, in the same places."""
    return (((numbers & 0x00FF00FF) * 3) >> 8) & 0x00030003


@kernel(alignment=2)
def TQ1_0(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 27
    # Four elements at a time: the same digit of the bytes of a word, 8 words, then 4, then 1.
    four = tl.arange(0, 64)
    second, third = four - 40, four - 60
    word = tl.where(third >= 0, 12, tl.where(second >= 0, 8 + second % 4, four % 8))
    digit = tl.where(third >= 0, third, tl.where(second >= 0, second // 4, four // 8))
    power = tl.where(digit % 2 == 1, 3, 1) * tl.where(digit >= 2, 9, 1) * tl.where(digit >= 4, 9, 1)
    words = word_at(start[:, None] + word[None, :] * 2)
    power = power.to(tl.uint32)[None, :]
    even = _first_digits((words & 0x00FF00FF) * power)
    odd = _first_digits(((words >> 8) & 0x00FF00FF) * power)
    digits = tl.reshape(spread(even | (odd << 8)), (TILE, 1, 256)).to(tl.float32)
    return digits - 1, half(tl.load(start + 26), DTYPE)[:, None]


@kernel(alignment=2)
def TQ2_0(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 33
    words = start[:, None, None] + tl.arange(0, 2)[None, :, None] * 16 + tl.arange(0, 8)[None, None, :] * 2
    q = tl.reshape(spread(four_pairs(word_at(words))), (TILE, 1, 256)).to(tl.float32) - 1
    return q, half(tl.load(start + 32), DTYPE)[:, None]

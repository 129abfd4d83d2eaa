"""Triton's IQ4_NL, IQ4_XS, MXFP4 and NVFP4. Layouts: `unpack_codebook`; arguments: `unpack_triton`.

Values come two at a time from a table, an entry of 32 bits for two nibbles; as bf16, which holds all of them:
the upper halves of fp32 numbers.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .unpack_codebook import E2M1_DOUBLED, IQ4_VALUES
from .unpack_triton import half, kernel, load_each


@lru_cache(maxsize=16)
def _pairs(values: tuple[float, ...], device: torch.device) -> Tensor:
    """int32 (256,): entry 16 * b + a is bf16 `values[a]`, `values[b]`, the first in the lower half."""
    of_nibble = torch.tensor(values, dtype=torch.bfloat16)
    pairs = torch.stack((of_nibble.repeat(16), of_nibble.repeat_interleave(16)), 1)
    return pairs.view(torch.int32).view(-1).to(device)


@triton.jit
def _both(pairs):
    """Pairs of bf16, int32 (..., n) -> fp32 (..., n, 2)."""
    return tl.join((pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True))


@triton.jit
def _of_bytes(table, start, scales, TILE: tl.constexpr):
    """From pointers (TILE, 1) to 16 bytes: fp32 (TILE, 4, 8), low nibbles first. Of a block's scale, twice,
    (TILE, 2): those of the four."""
    # A thread has 8 bytes, one after the other, and the scale.
    byte = tl.arange(0, 8)[:, None, None] + tl.arange(0, 2)[None, None, :] * 8
    numbers = _both(load_each(table + load_each(start[None, :, :] + byte).to(tl.int32)))
    numbers = tl.reshape(tl.permute(numbers, (1, 3, 2, 0)), (TILE, 4, 8))
    return numbers, tl.reshape(tl.broadcast_to(scales[:, None, :], (TILE, 2, 2)), (TILE, 4))


@triton.jit
def _twice(pointers):
    """What pointers (TILE, 1) point to, (TILE, 2)."""
    return load_each(pointers + tl.zeros((1, 2), tl.int32))


@triton.jit
def _of_words(table, start, high):
    """From pointers to 8 bytes: fp32 (..., 2, 2, 2), of their low nibbles, or high ones where `high` is 1."""
    shift = (high * 4).to(tl.uint32)
    first = (load_each(start) >> shift) & 0x0F0F0F0F
    second = (load_each(start + 1) >> shift) & 0x0F0F0F0F
    # Two nibbles side by side in every half-word.
    first, second = (first | (first >> 4)).to(tl.int32), (second | (second >> 4)).to(tl.int32)
    evens = tl.join(load_each(table + (first & 255)), load_each(table + (second & 255)))
    odds = tl.join(load_each(table + ((first >> 16) & 255)), load_each(table + ((second >> 16) & 255)))
    return _both(tl.join(evens, odds))


@kernel(alignment=2, table=partial(_pairs, IQ4_VALUES), stripes=2)
def IQ4_NL(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    d = half(_twice((packed.to(tl.pointer_type(tl.uint16)) + blocks * 9)[:, None]), DTYPE)
    return _of_bytes(table, (packed + blocks * 18 + 2)[:, None], d, TILE)


@kernel(alignment=4, table=partial(_pairs, IQ4_VALUES), stripes=4)
def IQ4_XS(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    # By rows of 8 elements, as in `unpack_triton_grid`.
    stripe, row = tl.arange(0, 4)[:, None, None], tl.arange(0, 8)[None, None, :]
    start = (packed + blocks * 136)[None, :, None]
    group = stripe * 2 + row // 4
    top = load_each(start + 2 + group // 4).to(tl.int32) >> (group % 4 * 2)
    low = load_each(start + 4 + group // 2).to(tl.int32) >> (group % 2 * 4)
    d = half(tl.load(packed.to(tl.pointer_type(tl.uint16)) + blocks * 68), DTYPE)
    scales = (((low & 15) | ((top & 3) << 4)) - 32).to(tl.float32) * d[None, :, None]
    words = (packed.to(tl.pointer_type(tl.uint32)) + blocks * 34)[None, :, None]
    numbers = _of_words(table, words + 2 + stripe * 8 + row // 4 * 4 + row % 2 * 2, row // 2 % 2)
    numbers = tl.reshape(tl.permute(numbers, (1, 0, 2, 3, 4, 5)), (TILE, 32, 8))
    return numbers, tl.reshape(tl.permute(scales, (1, 0, 2)), (TILE, 32))


@kernel(table=partial(_pairs, E2M1_DOUBLED), stripes=2)
def MXFP4(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = (packed + blocks * 17)[:, None]
    exponent = _twice(start).to(tl.int32)
    # 2 ** (exponent - 128): the first two are subnormal.
    bits = tl.where(exponent < 2, 0x00200000 << (exponent & 1), (exponent - 1) << 23)
    return _of_bytes(table, start + 1, bits.to(tl.float32, bitcast=True), TILE)


@kernel(alignment=4, table=partial(_pairs, E2M1_DOUBLED))
def NVFP4(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    # By rows of 8 elements, two of a group.
    row = tl.arange(0, 8)[None, :]
    byte = load_each((packed + blocks * 36)[:, None] + row // 2).to(tl.int32)
    # Unsigned E4M3, bias 7, halved: normal numbers by their bits, subnormal ones by their value.
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = (((exponent + 119) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    scales = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.0009765625, normal)
    scales = tl.where(byte == 0x7F, 0.0, scales)
    words = (packed.to(tl.pointer_type(tl.uint32)) + blocks * 9)[:, None]
    return tl.reshape(_of_words(table, words + 1 + row // 2 * 2, row % 2), (TILE, 8, 8)), scales

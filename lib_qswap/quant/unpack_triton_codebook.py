"""Triton's IQ4_NL, IQ4_XS, MXFP4 and NVFP4. Layouts: `unpack_codebook`; arguments: `unpack_triton`."""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from .unpack_codebook import E2M1_DOUBLED, IQ4_VALUES
from .unpack_triton import half, kernel, spread, two_nibbles, value_table, word_at

_iq4 = partial(value_table, IQ4_VALUES)
_e2m1 = partial(value_table, E2M1_DOUBLED)


@triton.jit
def _look_up(table, nibbles, TILE: tl.constexpr, GROUPS: tl.constexpr, COUNT: tl.constexpr):
    """fp32 (TILE, GROUPS, COUNT)."""
    return tl.load(table + tl.reshape(nibbles, (TILE, GROUPS, COUNT)).to(tl.int32))


@kernel(alignment=2, table=_iq4)
def IQ4_NL(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed.to(tl.pointer_type(tl.uint16)) + blocks * 9
    words = word_at(start[:, None, None] + 1 + 2 * tl.arange(0, 4)[None, None, :])
    return _look_up(table, spread(two_nibbles(words)), TILE, 1, 32), half(tl.load(start), DTYPE)[:, None]


@kernel(alignment=4, table=_iq4)
def IQ4_XS(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    group = tl.arange(0, 8)
    head = packed + (blocks * 136)[:, None]
    top = tl.load(head + 2 + (group // 4)[None, :]) >> (group % 4 * 2).to(tl.uint8)[None, :]
    low = tl.load(head + 4 + (group // 2)[None, :]) >> (group % 2 * 4).to(tl.uint8)[None, :]
    d = half(tl.load(packed.to(tl.pointer_type(tl.uint16)) + blocks * 68), DTYPE)
    scales = (((low & 15) | ((top & 3) << 4)).to(tl.float32) - 32) * d[:, None]
    start = packed.to(tl.pointer_type(tl.uint32)) + (blocks * 34)[:, None, None]
    words = tl.load(start + 2 + tl.arange(0, 8)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :])
    return _look_up(table, spread(two_nibbles(words)), TILE, 8, 32), scales


@kernel(table=_e2m1)
def MXFP4(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    start = packed + blocks * 17
    exponent = tl.load(start).to(tl.int32)
    # 2 ** (exponent - 128): the first two are subnormal.
    bits = tl.where(exponent < 2, 0x00200000 << (exponent & 1), (exponent - 1) << 23)
    # 17 bytes: at any address.
    data = start[:, None, None] + 1 + tl.arange(0, 4)[None, None, :] * 4
    words = tl.load(data).to(tl.uint32) | (tl.load(data + 1).to(tl.uint32) << 8)
    words = words | (tl.load(data + 2).to(tl.uint32) << 16) | (tl.load(data + 3).to(tl.uint32) << 24)
    scales = bits.to(tl.float32, bitcast=True)[:, None]
    return _look_up(table, spread(two_nibbles(words)), TILE, 1, 32), scales


@kernel(alignment=4, table=_e2m1)
def NVFP4(packed, table, blocks, TILE: tl.constexpr, DTYPE: tl.constexpr):
    byte = tl.load(packed + (blocks * 36)[:, None] + tl.arange(0, 4)[None, :]).to(tl.int32)
    # Unsigned E4M3, bias 7, halved: normal numbers by their bits, subnormal ones by their value.
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = (((exponent + 119) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    scales = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.0009765625, normal)
    scales = tl.where(byte == 0x7F, 0.0, scales)
    start = packed.to(tl.pointer_type(tl.uint32)) + (blocks * 9)[:, None, None]
    words = tl.load(start + 1 + tl.arange(0, 4)[None, :, None] * 2 + tl.arange(0, 2)[None, None, :])
    return _look_up(table, spread(two_nibbles(words)), TILE, 4, 16), scales

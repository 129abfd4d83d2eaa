"""Four-bit types whose numbers stand for 16 fixed values: IQ4_NL, IQ4_XS, MXFP4 and NVFP4. Arguments as in
`unpack_legacy`.

Values come two at a time from a table: one index is a pair of neighbouring elements, one entry two fp32
values.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .words import as_words, bit_fields, every_byte, half_scale

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# E2M1 (sign, two exponent bits, one mantissa bit), doubled to be whole; the block scale is halved for that.
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@lru_cache(maxsize=16)
def _pair_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 (0x0F10,): entry 256 * b + a is fp32 `values[a]`, `values[b]`."""
    pairs = torch.zeros((16, 256, 2), dtype=torch.float32)
    pairs[:, :16, 0] = torch.tensor(values)
    pairs[:, :, 1] = torch.tensor(values)[:, None]
    return pairs.view(torch.int64).view(-1)[:0x0F10].to(device)


def _look_up(words: Tensor, values: tuple[int, ...], shift: int) -> Tensor:
    """What the low (shift 0) or high (shift 4) nibbles of int64 words stand for, in order: fp32, flat."""
    nibbles = (words >> shift).bitwise_and_(every_byte(0x0F)).view(torch.int16)
    return _pair_table(values, words.device).index_select(0, nibbles.int().view(-1)).view(torch.float32)


def unpack_iq4_nl(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 16 bytes of nibbles as in Q4_0; d * value."""
    n = blocks.shape[0]
    scale = half_scale(blocks, 0)
    for half in range(2):
        values = _look_up(as_words(blocks), IQ4_VALUES, 4 * half).view(n, 18)[:, 2:]
        torch.mul(values, scale, out=out[:, 16 * half : 16 * half + 16])


def iq4_xs_scales(blocks: Tensor) -> Tensor:
    """fp32 (8 * n, 1)."""
    head = blocks.view(torch.int32)[:, :2]
    scales = bit_fields(head[:, 1:], 4, 4, 8).add_(bit_fields(head[:, :1] >> 16, 2, 2, 8), alpha=16)
    return scales.float().sub_(32).mul_(half_scale(blocks, 0)).view(-1, 1)


def unpack_iq4_xs(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 2 bytes of scale tops, 4 of scale nibbles, 8 x 16 of nibbles; d * (sc - 32) * value."""
    n = blocks.shape[0]
    scale = iq4_xs_scales(blocks)
    words = blocks.view(torch.int64)[:, 1:]
    halves = out.view(8 * n, 32)
    for half in range(2):
        values = _look_up(words, IQ4_VALUES, 4 * half).view(8 * n, 16)
        torch.mul(values, scale, out=halves[:, 16 * half : 16 * half + 16])


@lru_cache(maxsize=16)
def _e8m0_halved(device: torch.device) -> Tensor:
    """fp32 (256,): the power of two 2 ** (byte - 127), halved. The first two are subnormal."""
    byte = torch.arange(256)
    bits = torch.where(byte < 2, 0x00200000 << byte.clamp(max=1), (byte - 1) << 23)
    return bits.to(torch.int32).view(torch.float32).to(device)


def mxfp4_scales(blocks: Tensor) -> Tensor:
    """fp32 (n, 1), for doubled values."""
    return _e8m0_halved(blocks.device).index_select(0, blocks[:, 0].int()).view(-1, 1)


def unpack_mxfp4(blocks: Tensor, out: Tensor) -> None:
    """An exponent byte, 16 bytes of nibbles as in Q4_0; 2 ** (e - 127) * value."""
    n = blocks.shape[0]
    scale = mxfp4_scales(blocks)
    words = as_words(blocks[:, 1:].contiguous())
    for half in range(2):
        values = _look_up(words, E2M1_DOUBLED, 4 * half).view(n, 16)
        torch.mul(values, scale, out=out[:, 16 * half : 16 * half + 16])


@lru_cache(maxsize=16)
def _ue4m3_halved(device: torch.device) -> Tensor:
    """fp32 (256,): unsigned E4M3 (bias 7), halved; 0x7F, which would be NaN, counts as 0."""
    byte = torch.arange(256)
    exponent, mantissa = (byte >> 3) & 0x0F, (byte & 7).float()
    value = torch.where(exponent == 0, mantissa * 2.0**-9, torch.ldexp(1 + mantissa / 8, exponent - 7))
    return torch.where(byte == 0x7F, 0.0, value * 0.5).to(device)


def nvfp4_scales(blocks: Tensor) -> Tensor:
    """fp32 (4 * n, 1), for doubled values."""
    return _ue4m3_halved(blocks.device).index_select(0, blocks[:, :4].int().view(-1)).view(-1, 1)


def unpack_nvfp4(blocks: Tensor, out: Tensor) -> None:
    """4 scale bytes, 4 x 8 bytes: element i in the low nibble of byte i, 8 + i in the high one."""
    n = blocks.shape[0]
    scale = nvfp4_scales(blocks)
    words = as_words(blocks.view(torch.int32)[:, 1:].contiguous())
    groups = out.view(4 * n, 16)
    for half in range(2):
        values = _look_up(words, E2M1_DOUBLED, 4 * half).view(4 * n, 8)
        torch.mul(values, scale, out=groups[:, 8 * half : 8 * half + 8])

"""The K types: super-blocks of 256 elements, whose groups of 16 or 32 have small scales of their own.

Arguments as `unpack_legacy` says. A super-block is unpacked plane by plane: a plane is what the same bits of
consecutive bytes hold, 32 elements that lie together in the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .words import as_numbers, as_words, every_byte, half_scale, product, scaled_sum


def _group_scales(small: Tensor, blocks: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """The super-block's fp16 scale at `offset` times its groups' small ones, as fp32 numbers of `dtype`."""
    return (small * half_scale(blocks, offset, dtype)).to(dtype).float()


def _six_bit_scales(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Q4_K's and Q5_K's scales and negative minima, fp32 (2, n, 8): d * sc and -dmin * m.

    fp16 d, fp16 dmin, then 12 bytes for eight 6-bit sc and m each: the first four sc, the first four m, four
    bytes with the low nibbles of the other sc and m, whose two high bits are the top bits of the first eight
    bytes.
    """
    n = blocks.shape[0]
    words = blocks.view(torch.int32)
    first, rest = words[:, 1:3].t(), words[:, 3]
    six = torch.empty((2, n, 2), dtype=torch.int32, device=blocks.device)
    torch.bitwise_and(first, 0x3F3F3F3F, out=six[:, :, 0])
    torch.bitwise_right_shift(first, 2, out=six[:, :, 1]).bitwise_and_(0x30303030)
    six[0, :, 1].bitwise_or_(rest & 0x0F0F0F0F)
    six[1, :, 1].bitwise_or_((rest >> 4).bitwise_and_(0x0F0F0F0F))
    halves = blocks.view(torch.float16)[:, :2].t().to(dtype).float()
    halves[1].neg_()
    return (six.view(torch.uint8) * halves[:, :, None]).to(dtype).float()


def unpack_q4_k(blocks: Tensor, out: Tensor, computation_dtype: torch.dtype = torch.float32) -> None:
    """16 bytes of scales, 4 x 32 bytes with a low and a high plane; d * sc * q - dmin * m."""
    n = blocks.shape[0]
    scales, minima = _six_bit_scales(blocks, computation_dtype).view(2, 4 * n, 2, 1).unbind(0)
    scales[:, 1].mul_(1 / 16)
    words = blocks.view(torch.int64)[:, 2:]
    planes = out.view(4 * n, 2, 32)
    for half, mask in enumerate((0x0F, 0xF0)):
        q = as_numbers(words & every_byte(mask), 4 * n, 32)
        scaled_sum(q, scales[:, half], minima[:, half], computation_dtype, planes[:, half])


def unpack_q5_k(blocks: Tensor, out: Tensor, computation_dtype: torch.dtype = torch.float32) -> None:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit j of byte i for element 32 * j + i."""
    n = blocks.shape[0]
    scales, minima = _six_bit_scales(blocks, computation_dtype).permute(0, 2, 1).unsqueeze(3)
    scales.mul_(1 / 8)
    words = blocks.view(torch.int64)
    fifth = words[:, 2:6].contiguous()
    planes = out.view(n, 8, 32)
    for pair in range(4):
        nibbles = words[:, 6 + 4 * pair : 10 + 4 * pair].contiguous()
        for plane, four in ((2 * pair, nibbles << 3), (2 * pair + 1, nibbles >> 1)):
            top = (fifth << (7 - plane)).bitwise_and_(every_byte(0x80))
            q = as_numbers(four.bitwise_and_(every_byte(0x78)).bitwise_or_(top), n, 32)
            scaled_sum(q, scales[plane], minima[plane], computation_dtype, planes[:, plane])


def _by_plane(groups: Tensor) -> Tensor:
    """fp32 (n, 16), a number for every 16 elements -> (4, 4 * n, 1), plane by plane."""
    n = groups.shape[0]
    return groups.view(torch.int64).view(2 * n, 4).t().contiguous().view(torch.float32).view(4, 4 * n, 1)


def unpack_q6_k(blocks: Tensor, out: Tensor, computation_dtype: torch.dtype = torch.float32) -> None:
    """128 bytes of low nibbles, 64 bytes of 2 high bits, 16 signed scales, fp16 d; d * sc * (q - 32).

    A half super-block has four planes: the low, then the high nibbles of its 64 bytes; plane k has its high
    bits at bits 2 * k of the 32 bytes.
    """
    n = blocks.shape[0]
    signed_scales = blocks.view(torch.int8)[:, 192:208].float()
    scales = _by_plane(_group_scales(signed_scales, blocks, 208, computation_dtype).mul_(1 / 4))
    nibbles = blocks[:, :128].unflatten(1, (2, 2, 32))
    columns = [as_words(nibbles[:, :, column].contiguous()) for column in range(2)]
    # With the top bit of every pair flipped, q * 4 read as signed is (q - 32) * 4.
    pairs = as_words(blocks[:, 128:192].contiguous()) ^ every_byte(0xAA)
    planes = out.view(2 * n, 4, 32)
    for plane in range(4):
        column = columns[plane % 2]
        four = (column << 2 if plane < 2 else column >> 2).bitwise_and_(every_byte(0x3C))
        top = (pairs << (6 - 2 * plane)).bitwise_and_(every_byte(0xC0))
        q = as_numbers(four.bitwise_or_(top), 4 * n, 16, signed=True)
        planes[:, plane] = product(q, scales[plane], out.dtype).view(2 * n, 32)


def unpack_q2_k(blocks: Tensor, out: Tensor, computation_dtype: torch.dtype = torch.float32) -> None:
    """16 bytes of 4-bit sc and m, 2 x 32 bytes with four planes, fp16 d, fp16 dmin; d * sc * q - dmin * m."""
    n = blocks.shape[0]
    small_scales, small_minima = (blocks[:, :16] & 0x0F).float(), (blocks[:, :16] >> 4).float()
    scales = _by_plane(_group_scales(small_scales, blocks, 80, computation_dtype))
    minima = _by_plane(_group_scales(small_minima, blocks, 82, computation_dtype))
    words = as_words(blocks.view(torch.int32)[:, 4:20].contiguous())
    planes = out.view(2 * n, 4, 32)
    for plane in range(4):
        q = as_numbers(words & every_byte(3 << 2 * plane), 4 * n, 16)
        scaled = product(q, scales[plane] * 4.0**-plane, computation_dtype)
        planes[:, plane] = scaled.sub_(minima[plane]).view(2 * n, 32)


def _q3_k_scales(blocks: Tensor) -> Tensor:
    """Sixteen 6-bit scales less 32, fp32 (n, 16): 8 bytes of nibbles, low ones first, 4 of 2 high bits."""
    n = blocks.shape[0]
    packed = blocks[:, 96:108].contiguous().view(torch.int32)
    low, top = packed[:, :2], packed[:, 2:]
    four = torch.cat((low & 0x0F0F0F0F, (low >> 4).bitwise_and_(0x0F0F0F0F)), 1)
    two = torch.cat([(top >> 2 * group).bitwise_and_(0x03030303) for group in range(4)], 1)
    return four.bitwise_or_(two << 4).view(torch.uint8).view(n, 16).float().sub_(32)


def unpack_q3_k(blocks: Tensor, out: Tensor, computation_dtype: torch.dtype = torch.float32) -> None:
    """32 bytes of third bits, 64 bytes with planes as in Q2_K, 12 bytes of scales, fp16 d; d * sc * (q - 4).

    The third bit of plane k of a half super-block is bit 4 * half + k.
    """
    n = blocks.shape[0]
    scales = _by_plane(_group_scales(_q3_k_scales(blocks), blocks, 108, computation_dtype).mul_(1 / 32))
    pairs = as_words(blocks[:, 32:96].contiguous())
    # Flipped, as the top bit of a byte read as signed, it takes 4 off where it was clear.
    third = as_words(blocks[:, :32].contiguous()).bitwise_not_().view(n, 4)
    third = torch.stack((third, third >> 4), 1).view(-1)
    planes = out.view(2 * n, 4, 32)
    for plane in range(4):
        two = (pairs << (5 - 2 * plane) if plane < 3 else pairs >> 1).bitwise_and_(every_byte(0x60))
        top = (third << (7 - plane)).bitwise_and_(every_byte(0x80))
        q = as_numbers(two.bitwise_or_(top), 4 * n, 16, signed=True)
        planes[:, plane] = product(q, scales[plane], out.dtype).view(2 * n, 32)


def unpack_q8_k(blocks: Tensor, out: Tensor) -> None:
    """fp32 d, 256 signed bytes, 16 int16 sums that unpacking does not need; d * q."""
    torch.mul(blocks.view(torch.int8)[:, 4:260].float(), blocks.view(torch.float32)[:, :1], out=out)

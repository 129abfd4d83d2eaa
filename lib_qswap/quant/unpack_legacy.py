"""The types with one scale for each block: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q1_0 and Q2_0.

What holds for every `unpack_*` function of this package: blocks is uint8 (n, block_bytes), contiguous, 8-byte
aligned, n a multiple of `BLOCK_GRANULE`. The values go into out (n, block_elements), each rounded once to
out's dtype. With a computation dtype of fp16 or bf16, scales and products are rounded to it where Forge does
that; out is then fp32 or of that dtype, and a value in fp32 has still to be rounded.

Numbers are left where they lie in their byte; the power of two that this multiplies them by is taken off the
scale, in fp32, where that is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .words import as_numbers, as_words, constant, every_byte, half_scale, kept_table, scaled_sum


def unpack_q4_0(blocks: Tensor, out: Tensor, computation_dtype: torch.dtype = torch.float32) -> None:
    """fp16 d, 16 bytes: element i in the low nibble of byte i, 16 + i in the high one; d * (q - 8)."""
    n = blocks.shape[0]
    scale = half_scale(blocks, 0, computation_dtype).mul_(1 / 16)
    # With its top bit flipped, a high nibble read as signed is (q - 8) * 16.
    flipped = as_words(blocks) ^ every_byte(0x88)
    for half, nibbles in enumerate((flipped << 4, flipped)):
        q = as_numbers(nibbles.bitwise_and_(every_byte(0xF0)), n, 18, signed=True)
        torch.mul(q[:, 2:], scale, out=out[:, 16 * half : 16 * half + 16])


def unpack_q4_1(blocks: Tensor, out: Tensor, computation_dtype: torch.dtype = torch.float32) -> None:
    """fp16 d, fp16 m, 16 bytes of nibbles as in Q4_0; d * q + m."""
    n = blocks.shape[0]
    scale = half_scale(blocks, 0, computation_dtype)
    minimum = half_scale(blocks, 2, computation_dtype)
    words = as_words(blocks)
    for half, (mask, unit) in enumerate(((0x0F, 1.0), (0xF0, 1 / 16))):
        q = as_numbers(words & every_byte(mask), n, 20)[:, 4:]
        scaled_sum(q, scale * unit, minimum, computation_dtype, out[:, 16 * half : 16 * half + 16])


@kept_table(maxsize=16)
def bits_to_top(device: torch.device) -> Tensor:
    """int64 (256,): bit j of the index as the top bit of byte j."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (bits << 7).to(torch.uint8).view(torch.int64).view(-1).to(device)


def _five_bits(blocks: Tensor, high_offset: int, low_offset: int) -> Tensor:
    """int64 (2, n, 2): the words of [half, block] hold elements 16 * half on, times 8.

    The fifth bits are 4 bytes, lowest bit first; the nibbles 16 bytes as in Q4_0.
    """
    n = blocks.shape[0]
    low = as_words(blocks[:, low_offset:].contiguous())
    fifth = blocks[:, high_offset:low_offset].int().view(-1)
    fifth = bits_to_top(blocks.device).index_select(0, fifth).view(n, 2, 2)
    q = torch.stack((low << 3, low >> 1)).bitwise_and_(every_byte(0x78)).view(2, n, 2)
    return q.bitwise_or_(fifth.transpose(0, 1))


def unpack_q5_0(blocks: Tensor, out: Tensor, computation_dtype: torch.dtype = torch.float32) -> None:
    """fp16 d, 32 fifth bits, 16 bytes of nibbles as in Q4_0; d * (q - 16)."""
    n = blocks.shape[0]
    scale = half_scale(blocks, 0, computation_dtype).mul_(1 / 8)
    # With its top bit flipped, q * 8 read as signed is (q - 16) * 8.
    q = as_numbers(_five_bits(blocks, 2, 6).bitwise_xor_(every_byte(0x80)), 2, n, 16, signed=True)
    for half in range(2):
        torch.mul(q[half], scale, out=out[:, 16 * half : 16 * half + 16])


def unpack_q5_1(blocks: Tensor, out: Tensor, computation_dtype: torch.dtype = torch.float32) -> None:
    """fp16 d, fp16 m, 32 fifth bits, 16 bytes of nibbles as in Q4_0; d * q + m."""
    n = blocks.shape[0]
    scale = half_scale(blocks, 0, computation_dtype).mul_(1 / 8)
    minimum = half_scale(blocks, 2, computation_dtype)
    q = as_numbers(_five_bits(blocks, 4, 8), 2, n, 16)
    for half in range(2):
        scaled_sum(q[half], scale, minimum, computation_dtype, out[:, 16 * half : 16 * half + 16])


def unpack_q8_0(blocks: Tensor, out: Tensor, computation_dtype: torch.dtype = torch.float32) -> None:
    """fp16 d, 32 signed bytes; d * q."""
    q = as_numbers(as_words(blocks), *blocks.shape, signed=True)
    torch.mul(q[:, 2:], half_scale(blocks, 0, computation_dtype), out=out)


def unpack_q1_0(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 128 bits, lowest first; d where the bit is set, else -d."""
    bits = constant(blocks.device, torch.uint8, 1, 2, 4, 8, 16, 32, 64, 128)
    signs = (blocks[:, 2:, None] & bits).ne(0).float().mul_(2).sub_(1)
    torch.mul(signs.flatten(1), half_scale(blocks, 0), out=out)


def unpack_q2_0(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 16 bytes of four 2-bit numbers, lowest first; d * (q - 1)."""
    # Each byte's numbers to the bytes of a word; what they pass on the way is masked.
    words = blocks[:, 2:].int()
    words.bitwise_or_(words << 12)
    words.bitwise_or_(words << 6).bitwise_and_(0x03030303)
    # q + 127 with the top bit flipped is q - 1.
    words.add_(0x7F7F7F7F).bitwise_xor_(-0x7F7F7F80)
    q = as_numbers(words, blocks.shape[0], 64, signed=True)
    torch.mul(q, half_scale(blocks, 0), out=out)

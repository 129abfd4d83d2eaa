"""TQ1_0 and TQ2_0: every element is -d, 0 or d. Arguments as in `unpack_legacy`."""

from __future__ import annotations

import torch
from torch import Tensor

from .words import as_numbers, as_words, every_byte, half_scale


def unpack_tq1_0(blocks: Tensor, out: Tensor) -> None:
    """48 bytes of five base-3 digits, 4 bytes of four, fp16 d; d * (digit - 1).

    A byte is the digits as a fraction of 243, in 256ths: multiplied by 3 ** k modulo 256, its first digit is
    digit k. Digit k of the first 32 bytes are elements 32 * k on, of the next 16 bytes 160 + 16 * k on, of
    the last 240 + 4 * k on.
    """
    n = blocks.shape[0]
    scale = half_scale(blocks, 52)
    digits = torch.empty((n, 256), dtype=torch.int16, device=blocks.device)  # less 1
    fractions = blocks[:, :52].short()
    for digit in range(5):
        fractions.mul_(3)  # the digit before the point, the others behind it
        whole = (fractions >> 8).sub_(1)
        for start, end, first, count in ((0, 32, 0, 5), (32, 48, 160, 5), (48, 52, 240, 4)):
            if digit < count:
                width = end - start
                digits[:, first + digit * width : first + (digit + 1) * width] = whole[:, start:end]
        fractions.bitwise_and_(0xFF)
    torch.mul(digits.float(), scale, out=out)


def unpack_tq2_0(blocks: Tensor, out: Tensor) -> None:
    """2 x 32 bytes of four 2-bit planes, fp16 d; d * (q - 1)."""
    n = blocks.shape[0]
    scale = half_scale(blocks, 64).unsqueeze(2)
    words = as_words(blocks[:, :64].contiguous())
    planes = out.view(n, 2, 4, 32)
    for plane in range(4):
        q = (words >> 2 * plane).bitwise_and_(every_byte(3)).view(torch.int8).sub_(1)
        torch.mul(as_numbers(q, n, 2, 32, signed=True), scale, out=planes[:, :, plane])

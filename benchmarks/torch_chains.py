"""Q4_K, Q5_K and Q6_K as a plain chain of torch operations on whole tensors, the way GGUF loaders in Python
do it: blocks are split into their fields, bits shifted by small tensors, scales and products kept in the
computation dtype. Written for comparison; `lib_qswap.quant` has what QSwap uses. The small tensors are made
once, which is in favour of the chain.

Each takes uint8 (n, block bytes) and a dtype, and returns (n, 256) of that dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def _shifts(device: torch.device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8, device=device)


def _six_bit_fields(scales: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes of every block -> eight scales, eight minima."""
    first, second, rest = scales.reshape(-1, 3, 4).unbind(1)
    small = torch.cat((first & 0x3F, (rest & 0x0F) | ((first >> 2) & 0x30)), dim=1)
    minima = torch.cat((second & 0x3F, (rest >> 4) | ((second >> 2) & 0x30)), dim=1)
    return small, minima


def _scales_and_minima(d: Tensor, dmin: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    small, minima = _six_bit_fields(scales)
    d, dmin = d.view(torch.float16).to(dtype), dmin.view(torch.float16).to(dtype)
    return (d * small).unsqueeze(2), (dmin * minima).unsqueeze(2)


def q4_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    d, dmin, scales, quants = blocks.split_with_sizes((2, 2, 12, 128), dim=1)
    scale, minimum = _scales_and_minima(d.contiguous(), dmin.contiguous(), scales, dtype)
    low = quants.reshape(-1, 4, 1, 32) >> _shifts(blocks.device, 0, 4).view(1, 1, 2, 1)
    return (scale * (low & 0x0F).reshape(-1, 8, 32) - minimum).reshape(-1, 256)


def q5_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    d, dmin, scales, high, quants = blocks.split_with_sizes((2, 2, 12, 32, 128), dim=1)
    scale, minimum = _scales_and_minima(d.contiguous(), dmin.contiguous(), scales, dtype)
    low = quants.reshape(-1, 4, 1, 32) >> _shifts(blocks.device, 0, 4).view(1, 1, 2, 1)
    top = high.reshape(-1, 1, 32) >> _shifts(blocks.device, *range(8)).view(1, 8, 1)
    q = (low & 0x0F).reshape(-1, 8, 32) | ((top & 0x01) << 4)
    return (scale * q - minimum).reshape(-1, 256)


def q6_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    quants, high, scales, d = blocks.split_with_sizes((128, 64, 16, 2), dim=1)
    d = d.contiguous().view(torch.float16).to(dtype)
    scale = (d * scales.view(torch.int8).to(dtype)).unsqueeze(2)
    low = quants.reshape(-1, 2, 1, 64) >> _shifts(blocks.device, 0, 4).view(1, 1, 2, 1)
    low = (low & 0x0F).reshape(-1, 8, 32)
    top = high.reshape(-1, 2, 1, 32) >> _shifts(blocks.device, 0, 2, 4, 6).view(1, 1, 4, 1)
    top = (top & 0x03).reshape(-1, 8, 32)
    q = (low | (top << 4)).to(torch.int8) - 32
    return (scale * q.reshape(-1, 16, 16)).reshape(-1, 256)


CHAINS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {"Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}

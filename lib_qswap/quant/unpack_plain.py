"""The plain floating-point types, whose bytes are the values. Arguments as `unpack_legacy` says."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_f32(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.float32))


def unpack_f16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.float16))


def unpack_bf16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.bfloat16))

"""One or two tokens times a packed weight without unpacking it first, where a kernel can.

Flux has 27 % of its parameters in layers that see one token. For so few, writing the unpacked weight and
reading it again is most of the work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .packed import PackedTensor

_MOST_TOKENS = 2
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def serves(weight: object, x: Tensor) -> bool:
    """Whether `product` can be expected to compute x times this weight. The answer depends on the weight's
    type and shape and on `x`, and not on where the weight is."""
    return (
        0 < x.numel() <= _MOST_TOKENS * x.shape[-1]
        and isinstance(weight, PackedTensor)
        and weight.dim() == 2
        and weight.shape[1] == x.shape[-1]
        and weight.shape[1] % weight.format.block_elements == 0
        and x.dtype in _DTYPES
        and not x.requires_grad
        and not torch.is_autocast_enabled()
        and kernels.has_product(weight.format, x.device)
    )


def product(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """`torch.nn.functional.linear(x, weight, bias)` with exact fp32 weights, for a weight that `serves` has
    accepted and that is on x's device; None where its kernel has just failed."""
    if not isinstance(weight, PackedTensor):
        return None
    rows, elements = weight.shape
    inputs = x.reshape(-1, elements).contiguous()
    out = kernels.product_with_triton(weight.format, weight.packed, inputs, bias, rows)
    return None if out is None else out.view(*x.shape[:-1], rows)

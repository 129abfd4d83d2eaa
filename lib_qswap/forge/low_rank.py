"""LoRAs added to an unpacked weight in one pass over it.

In every step Forge's way copies the weight, and makes the product of the two matrices and its multiple, each
as large as the weight and each rounded. Here one multiply-add makes the sum, in fp32 and rounded at its end
(the CPU's, in fp16 and with high ranks, in a few parts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class LowRank(NamedTuple):
    """`target` is to have `scale` times the product of `up` (rows, rank) and `down` (rank, columns) added."""

    target: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    scale: float


def add_in_place(weight: torch.Tensor, patches: Sequence[Sequence[Any]]) -> bool:
    """Adds `patches` to `weight`, which nobody else reads. They have Forge's form: strength, value, strength
    of the weight, part of the weight, function.

    Returns whether it did: where one of them is no plain LoRA of fitting shape, nothing is changed.
    """
    found = [_low_rank(weight, patch) for patch in patches]
    added = [one for one in found if one is not None]
    if len(added) != len(found):
        return False
    for target, up, down, scale in added:
        target.addmm_(up, down, alpha=scale)
    return True


def _low_rank(weight: torch.Tensor, patch: Sequence[Any]) -> LowRank | None:
    strength, value, weight_strength, part, function = patch
    if weight_strength != 1 or function is not None or not _is_lora(value):
        return None
    up, down, alpha, middle, dora_scale = value[1]
    if middle is not None or dora_scale is not None:
        return None
    target = weight if part is None else weight.narrow(*part)
    if target.dim() > 2:  # A convolution's kernel.
        if not target.is_contiguous():
            return None
        target = target.view(target.shape[0], -1)
    up, down = (one.flatten(start_dim=1).to(weight.device, weight.dtype) for one in (up, down))
    rank = down.shape[0]
    if target.dim() != 2 or up.shape != (target.shape[0], rank) or down.shape[1] != target.shape[1]:
        return None
    return LowRank(target, up, down, strength * (1.0 if alpha is None else alpha / rank))


def _is_lora(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and value[0] == "lora" and len(value[1]) == 5

"""A state dict whose weights are quantized in several tensors each, as safetensors files have them, with one
packed weight in the place of each.

Known are bitsandbytes' NF4 and FP4 (`bnb_weight`), and FP8 with one scale for the weight in `scale_weight` or
`weight_scale` (what ComfyUI calls scaled FP8), or with none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from . import bnb_weight
from .formats import scaled
from .packed import PackedTensor

_FP8 = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
_SCALES = ("scale_weight", "weight_scale")
# Scales of what the weight is multiplied with, for products in FP8, and how the file was made.
_WITHOUT_USE = ("scale_input", "input_scale", "comfy_quant")


def pack_state_dict(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """`tensors` by name, quantized weights packed and the tensors that describe them left out.

    dtype: logical, of FP8 weights; those of bitsandbytes have the one that the file names. FP8 bytes are
    aliased, those of bitsandbytes copied. All else is passed on as it is.

    Raises ValueError, which names the weight, for one that is damaged or quantized in another way.
    """
    states = _bnb_states(tensors)
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        try:
            if name in states:
                packed[name] = bnb_weight.from_checkpoint(tensor, states[name])
            elif _describes_another(name, tensors, states):
                continue
            elif tensor.dtype in _FP8:
                packed[name] = _fp8(tensor, _scale(tensors, name), dtype)
            else:
                packed[name] = tensor
        except ValueError as error:
            raise ValueError(f"{name}: {error}; take this model in another quantization") from error
    return packed


def _bnb_states(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By the names of bitsandbytes' weights, what else there is of each."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, separator, field = name.rpartition(".weight.")
        if separator:
            states.setdefault(f"{layer}.weight", {})[field] = tensor
    return {
        name: state
        for name, state in states.items()
        if name in tensors and any(field.startswith(bnb_weight.STATE_KEY) for field in state)
    }


def _describes_another(
    name: str, tensors: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]
) -> bool:
    """Whether the tensor `name` says something about a quantized weight, and is none itself."""
    layer, dot, field = name.rpartition(".")
    if field == "scaled_fp8":  # one for the whole model
        return True
    if f"{name.rpartition('.weight.')[0]}.weight" in states:
        return True
    if field not in (*_SCALES, *_WITHOUT_USE):
        return False
    weight = tensors.get(f"{layer}{dot}weight")
    is_fp8 = weight is not None and weight.dtype in _FP8
    if field == "comfy_quant" and not is_fp8:
        raise ValueError("quantized in a way of ComfyUI's that QSwap does not know")
    return is_fp8


def _scale(tensors: Mapping[str, Tensor], name: str) -> float:
    """What the FP8 tensor `name` is to be multiplied by."""
    if f"{name}_scale_inv" in tensors:
        raise ValueError(
            "its scales, in weight_scale_inv, are of blocks of it: QSwap knows one for the whole"
        )
    for field in _SCALES:
        scale = tensors.get(name.removesuffix("weight") + field) if name.endswith("weight") else None
        if scale is not None:
            if scale.numel() != 1 or not math.isfinite(scale.float().item()):
                raise ValueError(f"its {field}, of shape {tuple(scale.shape)}, is not one number")
            return scale.float().item()
    return 1.0


def _fp8(tensor: Tensor, scale: float, dtype: torch.dtype) -> PackedTensor:
    packed = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return PackedTensor(packed, scaled(_FP8[tensor.dtype], scale), tensor.shape, dtype)

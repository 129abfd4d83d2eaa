"""Weights that bitsandbytes quantized (NF4, FP4), in Forge.

A model of them that fits is Forge's, and bitsandbytes' own kernels compute it. One that does not is taken
over: its weights are packed (see `quant.bnb_weight`), swapped as any others, and unpacked when they are used.
With the arithmetic "like Forge" bitsandbytes computes then as well, from a copy in its own layout.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

from lib_qswap.quant import bnb_weight
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.quant.unpack_bnb import FP4_VALUES, NF4_VALUES

from . import managed, settings
from .loading import ForgePackedTensor
from .patches import Patch


def patches() -> list[Patch]:
    from backend import operations, utils

    found = []
    if hasattr(utils, "get_state_dict_after_quant"):  # Of what can be saved as a checkpoint.
        found.append(Patch(utils, "get_state_dict_after_quant", _state_dict_to_save))
    # Forge's own spelling. Without bitsandbytes it has no such layers.
    if getattr(operations, "bnb_avaliable", False):
        found.append(Patch(operations.ForgeOperationsBNB4bits.Linear, "forward", _linear))
    return found


def is_bnb(model: torch.nn.Module) -> bool:
    return any(hasattr(parameter, "bnb_quantized") for parameter in model.parameters())


def refusal(patcher: Any) -> str | None:
    """Why the model cannot be taken over; None if it can."""
    for name, parameter in patcher.model.named_parameters():
        if not hasattr(parameter, "bnb_quantized"):
            continue
        if not parameter.bnb_quantized:
            # Forge quantizes a plain checkpoint when it is first moved to the GPU, and to no other device.
            if patcher.load_device.type != "cuda":
                return f"{name} is not quantized yet, which takes an NVIDIA GPU"
            shape, blocksize = parameter.shape, parameter.blocksize
        else:
            shape, blocksize = parameter.quant_state.shape, parameter.quant_state.blocksize
        if math.prod(shape) % bnb_weight.BLOCK_ELEMENTS or blocksize % bnb_weight.BLOCK_ELEMENTS:
            return f"{name} is no whole number of blocks of {bnb_weight.BLOCK_ELEMENTS}"
    return None


def take_over(patcher: Any) -> None:
    """Packs the weights of a model that is on the CPU, one by one, so that QSwap can swap them.

    Weights that are not quantized yet are quantized by bitsandbytes on the patcher's device, as Forge does.
    LoRAs that Forge has merged are taken out first; they are added on the fly from then on.
    """
    patcher.lora_loader.refresh({}, offload_device=patcher.offload_device)
    with torch.inference_mode(False), torch.no_grad():
        for module in patcher.model.modules():
            for name, parameter in module._parameters.items():
                if hasattr(parameter, "bnb_quantized"):
                    packed = _packed(parameter, patcher.load_device)
                    module._parameters[name] = torch.nn.Parameter(packed, requires_grad=False)


def _packed(parameter: Any, device: torch.device) -> ForgePackedTensor:
    if not parameter.bnb_quantized:
        parameter = parameter.to(device)
    state = parameter.quant_state
    absmax = state.absmax.cpu()
    if state.nested:
        inner = state.state2
        absmax = bnb_weight.unnested(
            absmax, inner.code.cpu(), inner.absmax.cpu(), inner.blocksize, state.offset.item()
        )
    packed = bnb_weight.pack_blocks(
        parameter.data,
        absmax,
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        shape=state.shape,
        dtype=state.dtype,
        quant_map=state.code,
    )
    return ForgePackedTensor(packed.packed, packed.format, packed.shape, packed.dtype)


def _linear(original: Any, self: Any, x: torch.Tensor) -> torch.Tensor:
    from backend import operations

    if not isinstance(self.weight, PackedTensor):
        return original(self, x)
    # bitsandbytes adds no LoRA: Forge unpacks and multiplies then.
    as_bitsandbytes = settings.in_effect().arithmetic == "like Forge" and not hasattr(
        self, "forge_online_loras"
    )
    weight, bias, signal = operations.weights_manual_cast(self, x, skip_weight_dtype=as_bitsandbytes)
    with operations.main_stream_worker(weight, bias, signal):
        if as_bitsandbytes:
            return operations.functional_linear_4bits(x, _in_its_own_layout(self, weight), bias)
        return torch.nn.functional.linear(x, weight, bias)


def _state_dict_to_save(
    original: Any, model: torch.nn.Module, prefix: str = "", **kwargs: Any
) -> dict[str, torch.Tensor]:
    """What Forge writes into a checkpoint: weights that were packed as bitsandbytes had them.

    Raises:
        NotImplementedError: others are packed; Forge alone would write bytes that nobody can read.
    """
    packed = {
        name: (module, weight)
        for name, module in model.named_modules()
        if isinstance(weight := module._parameters.get("weight"), PackedTensor)
    }
    if any(not weight.format.name.startswith("BNB_") for _module, weight in packed.values()):
        raise NotImplementedError(
            "The weights of a GGUF file cannot be saved as another checkpoint: the file itself has them all."
        )
    saved: dict[str, torch.Tensor] = original(model, prefix, **kwargs)
    for name, (module, weight) in packed.items():
        key = f"{prefix}{name}.weight"
        own: Any = _in_its_own_layout(module, weight)
        saved[key] = own.cpu().clone()
        for entry, tensor in own.quant_state.as_dict(packed=True).items():
            saved[f"{key}.{entry}"] = tensor.cpu().clone()
    return saved


def _in_its_own_layout(layer: torch.nn.Module, weight: PackedTensor) -> torch.Tensor:
    """A copy of `weight` as bitsandbytes has it: nibbles, with a `quant_state`; in the scratch, if any."""
    from backend.operations_bnb import QuantState

    device = weight.packed.device
    served = managed.managed_layer(layer, device)
    size = torch.Size((weight.packed_nbytes,))
    if served is None:
        copy = torch.empty(size, dtype=torch.uint8, device=device)
    else:
        copy = served[0].state.scratch.view(size, torch.uint8)
    blocks = weight.packed.view(-1).view(torch.int32).view(-1, 9)
    absmax, nibbles = copy.view(torch.int32).split([len(blocks), 8 * len(blocks)])
    absmax.copy_(blocks[:, 0])
    nibbles.view(-1, 8).copy_(blocks[:, 1:])
    own: Any = nibbles.view(torch.uint8).view(-1, 1)
    quant_type = weight.format.name.removeprefix("BNB_").lower()
    own.quant_state = QuantState(
        absmax=absmax.view(torch.float32),
        shape=weight.shape,
        code=_quant_map(quant_type, device),
        blocksize=bnb_weight.BLOCK_ELEMENTS,
        quant_type=quant_type,
        dtype=weight.dtype,
    )
    return own


@lru_cache(maxsize=8)
def _quant_map(quant_type: str, device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4_VALUES if quant_type == "nf4" else FP4_VALUES, device=device)

"""From a .gguf file to Forge's modules: packed weights in the place of Forge's ParameterGGUF.

Forge's own reader copies every tensor, knows eleven types and fails with newer files; here the file is
mapped, and whatever `import gguf` finds inside Forge does not matter.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from lib_qswap.quant.gguf_file import GGUFError, open_gguf
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.swap import ledger
from lib_qswap.swap.inventory import GATHERED_FROM_BYTES

from . import names, notices, settings
from .patches import Patch


def patches() -> list[Patch]:
    from backend import memory_management, operations, utils

    # Modules that import a function by name have it under a name of their own.
    importers = [
        module
        for module in list(sys.modules.values())
        # Not every entry is a module: None and stand-ins are allowed there.
        if getattr(module, "__dict__", {}).get("load_torch_file") is utils.load_torch_file
    ]
    sd_models = sys.modules.get("modules.sd_models")
    loaders = [sd_models] if hasattr(sd_models, "forge_loader") else []
    return [
        *(Patch(module, "load_torch_file", _load_torch_file) for module in importers),
        *(Patch(module, "forge_loader", _forge_loader) for module in loaders),
        Patch(operations.ForgeOperationsGGUF.Linear, "_load_from_state_dict", _load_linear),
        Patch(operations.ForgeOperations.Linear, "_load_from_state_dict", _load_plain_linear),
        Patch(operations.ForgeOperations.Conv2d, "_load_from_state_dict", _load_convolution),
        Patch(operations.ForgeOperations.Embedding, "_load_from_state_dict", _load_embedding),
        Patch(memory_management, "unet_inital_load_device", _load_to_cpu),
        Patch(memory_management, "get_computation_dtype", _computation_dtype),
    ]


class GGMLClass:
    """What Forge reads as `gguf_cls` off a quantized parameter."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def bake(self, _parameter: torch.Tensor) -> None:
        """Nothing: the bytes stay as they are in the file."""

    def dequantize_pytorch(self, parameter: PackedTensor) -> torch.Tensor:
        return dequantize(parameter, parameter.dtype)

    def quantize_pytorch(self, _weight: torch.Tensor, _parameter: torch.Tensor) -> None:
        raise NotImplementedError(
            f"QSwap does not write to packed weights ({self.__name__}): LoRAs are applied on the fly"
        )


class ForgePackedTensor(PackedTensor):
    """A packed weight with the attributes that Forge reads off its own ParameterGGUF."""

    baked = True

    @property
    def gguf_cls(self) -> GGMLClass | None:
        """None for what the file holds in full precision, as in Forge."""
        return None if self.format.dtype is not None else GGMLClass(self.format.name)

    @property
    def real_shape(self) -> torch.Size:
        return self.shape

    @property
    def computation_dtype(self) -> torch.dtype:
        return self.dtype

    def dequantize_as_pytorch_parameter(self) -> ForgePackedTensor:
        """Itself: Forge asks for this because its own embeddings cannot hold what a GGUF holds."""
        return self


def dequantize(weight: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """`weight` unpacked with the arithmetic that the user chose; its logical dtype is what Forge's order of
    operations computes in."""
    return weight.dequantize(
        dtype, arithmetic=settings.in_effect().arithmetic, computation_dtype=weight.dtype
    )


def _load_torch_file(original: Any, ckpt: str, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    if not str(ckpt).lower().endswith(".gguf"):
        return original(ckpt, *args, **kwargs)
    try:
        file = open_gguf(ckpt)
        if reason := names.refusal(file):
            raise GGUFError(f"{file.path}: {reason}")
        return {name: _parameter(packed) for name, packed in names.known_to_forge(file).items()}
    except (GGUFError, OSError) as error:
        ledger.message(str(error), "error")
        raise


def _forge_loader(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Forge says "Failed to recognize model type!" whatever went wrong while it read the files."""
    try:
        return original(*args, **kwargs)
    except Exception as error:
        expect_no_model()
        if isinstance(error, ValueError) and isinstance(error.__context__, GGUFError | OSError):
            raise error.__context__ from None
        raise


def expect_no_model() -> None:
    """Lets Forge load the checkpoint again at the next generation: it takes the one that it had before for
    loaded even when it has dropped it."""
    from modules import sd_models

    sd_models.model_data.forge_hash = ""


def _parameter(packed: PackedTensor) -> torch.nn.Parameter:
    if packed.format.dtype is not None and packed.source is not None and not _is_large(packed):
        parameter = torch.nn.Parameter(packed.dequantize(), requires_grad=False)
        parameter.gguf_cls = None  # type: ignore[attr-defined]  # Forge takes the file for a GGUF by this.
        parameter.dequantize_as_pytorch_parameter = lambda: parameter  # type: ignore[attr-defined]
        return parameter
    dtype = packed.dtype if packed.format.dtype is not None else torch.float16
    return torch.nn.Parameter(
        ForgePackedTensor(packed.packed, packed.format, packed.shape, dtype, packed.source),
        requires_grad=False,
    )


def _is_large(packed: PackedTensor) -> bool:
    return packed.packed_nbytes >= 1 << 20


def _load_linear(original: Any, self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    if not hasattr(self, "dummy"):
        original(self, state_dict, prefix, *args)
        return
    # As Forge: unpacking to fp32 would be computed in fp16.
    dtype = self.dummy.dtype if self.dummy.dtype in (torch.float16, torch.bfloat16) else torch.float16
    for name in ("weight", "bias"):
        tensor = state_dict.get(prefix + name)
        if isinstance(tensor, PackedTensor) and tensor.format.dtype is None:
            tensor = torch.nn.Parameter(tensor.with_dtype(dtype), requires_grad=False)
        if tensor is not None:
            setattr(self, name, tensor)
    del self.dummy


def _load_plain_linear(original: Any, self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Where Forge expects plain weights (CLIP). What the file holds unquantized is stored in the dtype that
    Forge chose, as it does, so that it is neither larger nor more precise than there."""
    if hasattr(self, "dummy"):
        dtype = self.dummy.dtype
        state_dict = {
            name: tensor.dequantize(dtype)
            if isinstance(tensor, PackedTensor) and tensor.format.dtype not in (None, dtype)
            else tensor
            for name, tensor in state_dict.items()
        }
    original(self, state_dict, prefix, *args)


def _load_convolution(original: Any, self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Forge's convolutions copy into the weight that they were made with. What is quantized takes its place,
    and what is in the dtype that Forge chose: it need not be in RAM, the file has it."""
    weight = state_dict.get(prefix + "weight")
    if (
        isinstance(weight, PackedTensor)
        and weight.format.dtype in (None, self.weight.dtype)
        and _fits(self, weight)
    ):
        _bind_weight(original, self, state_dict, prefix, *args)
        self.parameters_manual_cast = True  # For Forge: the weight is not what it is computed with.
    else:
        original(self, state_dict, prefix, *args)


def _load_embedding(original: Any, self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """A large embedding stays as it is in the file: its rows are unpacked when they are looked up."""
    weight = state_dict.get(prefix + "weight")
    if not isinstance(weight, PackedTensor) or not _fits(self, weight):
        original(self, state_dict, prefix, *args)
    elif weight.packed_nbytes < GATHERED_FROM_BYTES:
        plain = dequantize(weight, self.weight.dtype)
        original(self, {**state_dict, prefix + "weight": plain}, prefix, *args)
    else:
        _bind_weight(original, self, state_dict, prefix, *args)


def _fits(module: Any, weight: PackedTensor) -> bool:
    return bool(weight.shape == module.weight.shape)


def _bind_weight(
    original: Any,
    self: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    *args: Any,
) -> None:
    """Loads a torch module with the weight of `state_dict` itself as its parameter, and the rest as usual."""
    name = prefix + "weight"
    rest = {key: tensor for key, tensor in state_dict.items() if key != name}
    original(self, rest, prefix, local_metadata, strict, missing_keys, *args)
    if name in missing_keys:
        missing_keys.remove(name)
    weight = state_dict[name].with_dtype(self.weight.dtype)
    self.weight = torch.nn.Parameter(weight, requires_grad=False)


def _load_to_cpu(_original: Any, *_args: Any, **_kwargs: Any) -> torch.device:
    """Masters live on the host, whatever room the device has at the moment of loading."""
    return torch.device("cpu")


def _computation_dtype(
    original: Any, inference_device: torch.device, *args: Any, **kwargs: Any
) -> torch.dtype:
    chosen = original(inference_device, *args, **kwargs)
    asked = settings.in_effect().compute_dtype
    if asked != "Auto":
        return torch.float16 if asked == "fp16" else torch.bfloat16
    if chosen == torch.bfloat16 and inference_device.type == "cuda" and not _computes_bf16(inference_device):
        notices.notice("this GPU does not compute in bf16: using fp16", once=True)
        return torch.float16
    return chosen


def _computes_bf16(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)

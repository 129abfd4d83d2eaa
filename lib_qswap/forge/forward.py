"""How Forge's layers get their weights: from a lease of the swap engine, unpacked on the compute stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from lib_qswap.quant import multiply
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.quant.unpack import Arithmetic
from lib_qswap.swap.execute import gather_rows, goes_back, let_go, linear, new_or_in, weight_for
from lib_qswap.swap.lease import Lease, ResidentLease

from . import loading, low_rank, managed, settings
from .patches import Patch


def patches() -> list[Patch]:
    from backend import operations
    from backend.patcher import controlnet

    return [
        # The ControlNet module has imported these two by name.
        Patch(operations, "weights_manual_cast", _weights_manual_cast),
        Patch(controlnet, "weights_manual_cast", _weights_manual_cast),
        Patch(operations, "main_stream_worker", _main_stream_worker),
        Patch(controlnet, "main_stream_worker", _main_stream_worker),
        Patch(operations.ForgeOperationsGGUF.Linear, "forward", _gguf_linear),
        Patch(operations.ForgeOperations.Embedding, "forward", _embedding),
    ]


def _weights_manual_cast(
    original: Any,
    layer: Any,
    x: torch.Tensor,
    skip_weight_dtype: bool = False,
    skip_bias_dtype: bool = False,
    weight_fn: Any = None,
    bias_fn: Any = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
    served = managed.managed_layer(layer, x.device)
    if served is None:
        if not isinstance(layer.weight, PackedTensor) or skip_weight_dtype:
            return original(layer, x, skip_weight_dtype, skip_bias_dtype, weight_fn, bias_fn)
        # Too small to be swapped, or computed on the CPU: the weight is where it is needed, only packed.
        weight, bias = _cast(layer.weight, x), _cast(layer.bias, x)
        arithmetic = settings.in_effect().arithmetic
        weight = _with_lora(layer, "weight", weight, layer.weight, arithmetic)
        return weight, _with_lora(layer, "bias", bias, layer.bias, arithmetic), None
    attachment, swapped = served
    scratch = None if goes_back(x) else attachment.state.scratch
    lease = attachment.acquire(swapped)
    try:
        packed, scale, plain_bias = (lease.parts.get(name) for name in ("weight", "scale_weight", "bias"))
        assert packed is not None
        weight = packed
        if not skip_weight_dtype:
            weight = weight_for(
                packed,
                x.dtype,
                scratch,
                arithmetic=attachment.arithmetic,
                computation_dtype=packed.dtype,
            )
        if scale is not None:
            scaled = new_or_in(scratch, weight.shape, weight.dtype, weight.device)
            weight = torch.mul(weight, scale.to(weight.dtype), out=scaled)
        bias = plain_bias if skip_bias_dtype else _cast(plain_bias, x)
        bias = let_go(lease, weight, bias, scratch)
        weight = _with_lora(layer, "weight", weight, packed, attachment.arithmetic)
        return weight, _with_lora(layer, "bias", bias, plain_bias, attachment.arithmetic), lease
    except BaseException:
        lease.release()
        raise


def _cast(tensor: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """`tensor` where and as `x` is."""
    if isinstance(tensor, PackedTensor):
        there: Any = tensor.to(x.device)
        return loading.dequantize(there, x.dtype)
    return None if tensor is None else tensor.to(device=x.device, dtype=x.dtype)


def _with_lora(
    layer: torch.nn.Module,
    name: str,
    tensor: torch.Tensor | None,
    master: torch.Tensor | None,
    arithmetic: Arithmetic,
) -> torch.Tensor | None:
    """`tensor` with the LoRAs that Forge has put on this layer; never written into `master`."""
    patches = getattr(layer, "forge_online_loras", {}).get(name)
    if patches is None or tensor is None:
        return tensor
    from backend.patcher.lora import merge_lora_to_weight

    if tensor is master:
        tensor = tensor.clone()
    # A plain weight is computed in Forge's order, whether or not it is swapped.
    is_exact = arithmetic == "exact" and isinstance(master, PackedTensor)
    if is_exact and low_rank.add_in_place(tensor, patches):
        return tensor
    return merge_lora_to_weight(
        patches=patches, weight=tensor, key=f"online {name} lora", computation_dtype=tensor.dtype
    )


@contextlib.contextmanager
def _main_stream_worker(original: Any, weight: Any, bias: Any, signal: Any) -> Iterator[None]:
    if isinstance(signal, (Lease, ResidentLease)):
        try:
            yield
        finally:
            signal.release()
    else:
        with original(weight, bias, signal):
            yield


def _gguf_linear(original: Any, self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As Forge's, which also puts new parameters into the module while it computes: here parameters stay what
    they are."""
    from backend import operations

    product = _product(self, x)
    if product is not None:
        return product
    weight, bias, signal = operations.weights_manual_cast(self, x)
    with operations.main_stream_worker(weight, bias, signal):
        return torch.nn.functional.linear(x, weight, bias)


def _product(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The layer's output for one or two tokens in one kernel, None where its weight has to be unpacked."""
    if not multiply.serves(layer.weight, x) or getattr(layer, "forge_online_loras", None):
        return None
    served = managed.managed_layer(layer, x.device)
    if served is None or served[0].arithmetic != "exact":
        return None
    attachment, swapped = served
    lease = attachment.acquire(swapped)
    try:
        parts = lease.parts
        return linear(parts["weight"], parts.get("bias"), x, attachment.state.scratch)
    finally:
        lease.release()


def _embedding(original: Any, self: torch.nn.Embedding, x: torch.Tensor) -> torch.Tensor:
    dtype = managed.gathered_dtype(self)
    if dtype is None and not isinstance(self.weight, PackedTensor):
        return original(self, x)
    return gather_rows(
        self.weight,
        x,
        dtype or self.weight.dtype,
        arithmetic=settings.in_effect().arithmetic,
        computation_dtype=torch.float16,  # Forge unpacks an embedding before it knows another.
    )

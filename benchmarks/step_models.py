"""The models that step_times.py runs, as QSwap and as other programs take them.

On a device that computes, the model is the Flux-shaped transformer of the demo. On the simulated accelerator
its layers compute nothing: each keeps the device busy for a set time, since real compute would share the
machine's cores with the copies. The times are in proportion to the operations of FLUX.1 at 1024 x 1024, so a
modulation layer, which sees one token, has bytes and next to no time. The first part of each is unpacking, in
proportion to the bytes that it reads and writes; whoever swaps the layer needs its packed weight no longer
than that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_qswap.quant import multiply
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.standalone.denoise import GUIDANCE, PIXELS_PER_TOKEN
from lib_qswap.standalone.flux import FluxShape, FluxTransformer, build, rotary_rotation
from lib_qswap.swap.execute import Scratch, linear, weight_for
from lib_qswap.swap.manager import Attachment

FLUX = FluxShape(hidden=3072, mlp=12288)
TEXT_TOKENS = 512
READ_BYTES = 64
"""What a layer that does not compute reads of its weight, at the end: enough to see a wrong one."""

MEMORY_BYTES_PER_OPERATION = 1 / 125
"""What a card moves in its memory in the time of one operation: 500 GB/s at 62 TFLOPS."""


class PackedLinear(nn.Linear):
    """A linear layer whose weight is its packed bytes, an ordinary uint8 parameter, which whoever swaps
    models can move. It computes as QSwap's layers do, unpacking into one scratch for the whole model, so that
    only the swapping differs."""

    def __init__(self, packed: PackedTensor, bias: Tensor | None, scratch: Scratch) -> None:
        with torch.device("meta"):
            super().__init__(packed.shape[1], packed.shape[0], bias=bias is not None)
        self.format, self.logical_shape, self.scratch = packed.format, packed.shape, scratch
        # A copy in RAM: whoever swaps it is not to wait for the file.
        self.weight = nn.Parameter(packed.packed.clone(), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = PackedTensor(self.weight.data, self.format, self.logical_shape, dtype=x.dtype)
        if multiply.serves(weight, x):
            return linear(weight, self.bias, x, self.scratch)
        return F.linear(x, weight_for(weight, x.dtype, self.scratch, arithmetic="exact"), self.bias)


def packed_flux(tensors: Mapping[str, PackedTensor], dtype: torch.dtype, scratch: Scratch) -> FluxTransformer:
    """The demo's transformer of `PackedLinear` layers."""
    model = build(tensors, "the demo model", dtype=dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            layer = PackedLinear(module.weight.detach(), module.bias, scratch)
            setattr(model.get_submodule(parent), leaf, layer)
    return model


def flux_inputs(
    model: FluxTransformer, pixels: int, text_tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Random arguments for one forward of `model` on a square image."""
    shape, side = model.shape, pixels // PIXELS_PER_TOKEN
    random = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(device, dtype)

    return (
        draw(1, side * side, shape.in_channels),
        draw(1, text_tokens, shape.context),
        draw(1, shape.vector),
        torch.full((1,), 0.5, device=device),
        rotary_rotation(shape.head_dim, text_tokens, side, side).to(device),
        torch.full((1,), GUIDANCE, device=device),
    )


# ------------------------------------------------------------------- layers that do not compute
class LayerWork(NamedTuple):
    """Floating-point operations, with those of the attention after it; elements of the weight."""

    operations: float
    elements: int


class BusyTimes(NamedTuple):
    """Seconds for which a layer keeps the device busy: reading its packed weight, and then."""

    unpacking: float
    multiplying: float


def flux_work(pixels: int = 1024) -> dict[str, LayerWork]:
    """What FLUX.1 does by linear layer, in the order of execution."""
    with torch.device("meta"):
        model = FluxTransformer(FLUX)
    tokens = (pixels // PIXELS_PER_TOKEN) ** 2 + TEXT_TOKENS
    work: dict[str, LayerWork] = {}

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        operations = 2.0 * args[0].numel() * module.out_features
        if name.endswith(("txt_attn.qkv", "linear1")):
            operations += 4.0 * tokens**2 * FLUX.hidden
        work[name] = LayerWork(operations, module.weight.numel())

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(functools.partial(note, name))
    model(*flux_inputs(model, pixels, TEXT_TOKENS, torch.device("meta"), torch.bfloat16))
    return work


def flux_times(compute_s: float, packed_bytes_per_element: float) -> dict[str, BusyTimes]:
    """The times of FLUX.1's layers where a step computes for `compute_s`, in the order of execution."""
    work = flux_work()
    scale = compute_s / sum(layer.operations for layer in work.values())
    times = {}
    for name, layer in work.items():
        moved = layer.elements * (packed_bytes_per_element + torch.bfloat16.itemsize)
        unpacking = min(layer.operations, moved / MEMORY_BYTES_PER_OPERATION)
        times[name] = BusyTimes(unpacking * scale, (layer.operations - unpacking) * scale)
    return times


class BusyLinear(nn.Linear):
    """Keeps the device busy for set times, then adds the last bytes of its weight to its input, uint8
    (READ_BYTES,)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, times: BusyTimes, busy: Callable[[float], None]):
        with torch.device("meta"):
            super().__init__(1, 1, bias=bias is not None)
        self.times, self.busy = times, busy
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def unpack(self, weight: Tensor) -> Tensor:
        self.busy(self.times.unpacking)
        packed = weight.packed if isinstance(weight, PackedTensor) else weight
        return packed.view(-1).view(torch.uint8)[-READ_BYTES:].clone()

    def multiply(self, unpacked: Tensor, x: Tensor) -> Tensor:
        self.busy(self.times.multiplying)
        return x + unpacked

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.unpack(self.weight.data), x)


class Chain(nn.Module):
    """Modules that run one after the other."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class BusyFlux(nn.Module):
    """The linear layers of a Flux-family file in the order of execution, block by block."""

    def __init__(
        self,
        tensors: Mapping[str, PackedTensor],
        times: Mapping[str, BusyTimes],
        busy: Callable[[float], None],
        weight_of: Callable[[PackedTensor], Tensor],
    ) -> None:
        """Args:
        times: by layer, in the order of execution.
        busy: keeps the device busy for some seconds.
        weight_of: what the layers get for a packed weight of the file.
        """
        super().__init__()
        blocks: dict[str, list[nn.Module]] = {}
        for name, took in times.items():
            bias = tensors[f"{name}.bias"].dequantize(torch.bfloat16)
            layer = BusyLinear(weight_of(tensors[f"{name}.weight"]), bias, took, busy)
            blocks.setdefault(block_of(name), []).append(layer)
        self.stem = Chain(blocks.pop("stem"))
        final = Chain(blocks.pop("final"))
        for kind in ("double_blocks", "single_blocks"):
            chains = [Chain(layers) for name, layers in blocks.items() if name.startswith(kind)]
            setattr(self, kind, nn.ModuleList(chains))
        self.final = final

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in (*self.double_blocks, *self.single_blocks):
            x = block(x)
        return self.final(x)


def block_of(name: str) -> str:
    """The block of a layer, "stem" for what comes before the blocks and "final" for what comes after them."""
    first, _, rest = name.partition(".")
    if first in ("double_blocks", "single_blocks"):
        return f"{first}.{rest.partition('.')[0]}"
    return "final" if first == "final_layer" else "stem"


def lend_to_busy_layers(attachment: Attachment) -> None:
    """Lets the layers of a `BusyFlux` that QSwap swaps use their leases, as a host with forwards of its own
    does: until the weight has been unpacked."""
    for layer in attachment.layers:
        module = layer.module()
        assert isinstance(module, BusyLinear)

        def forward(x: Tensor, layer: Any = layer, module: BusyLinear = module) -> Tensor:
            lease = attachment.acquire(layer)
            try:
                unpacked = module.unpack(lease.parts["weight"])
            finally:
                lease.release()
            return module.multiply(unpacked, x)

        module.__dict__["forward"] = forward

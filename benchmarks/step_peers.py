"""How other programs run a model that is not on the device: diffusers' group offloading, accelerate's
cpu_offload, mmgp. Each is there where it is installed, and is given its fastest documented options."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Peer = Callable[[nn.Module, torch.device], "Callable[[], None] | None"]
"""Makes a model on the CPU run on the device. Returns what gives back what it holds beside the model, if
anything does."""


class Movable(nn.Parameter):
    """A parameter whose `data` may be put on any device.

    PyTorch lets `parameter.data = tensor` change between CPU and CUDA, not to a device type from outside of
    it, such as the simulated one; diffusers relies on it. The tensor is in `held` here.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Movable:
        # Its own tensor holds on to nothing.
        self = super().__new__(cls, torch.empty(0, dtype=data.dtype), requires_grad)
        self.held = data
        return self

    @property
    def data(self) -> Tensor:
        return self.held

    @data.setter
    def data(self, tensor: Tensor) -> None:
        self.held = tensor

    @property
    def device(self) -> torch.device:
        return self.held.device

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.held.to(*args, **kwargs)


def make_movable(model: nn.Module) -> None:
    """Lets all parameters be `Movable`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = Movable(parameter.detach())


def find_peers(device: torch.device) -> dict[str, Peer]:
    """By name, those that are installed and can serve `device`."""
    peers: dict[str, Peer] = {}
    if importlib.util.find_spec("diffusers") is not None:
        for level in ("block_level", "leaf_level"):
            peers[f"diffusers {level}"] = functools.partial(_group_offloading, level, False)
            if device.type != "cpu":
                peers[f"diffusers {level} stream"] = functools.partial(_group_offloading, level, True)
    if importlib.util.find_spec("accelerate") is not None:
        peers["accelerate cpu_offload"] = _cpu_offload
    # It drives torch.cuda itself, whatever the device is.
    if importlib.util.find_spec("mmgp") is not None and device.type == "cuda":
        peers["mmgp"] = _mmgp
    return peers


def _group_offloading(level: str, stream: bool, model: nn.Module, device: torch.device) -> None:
    from diffusers.hooks import apply_group_offloading

    if device.type not in ("cpu", "cuda", "xpu"):
        make_movable(model)
    apply_group_offloading(
        model,
        onload_device=device,
        offload_type=level,
        num_blocks_per_group=1,
        non_blocking=True,
        use_stream=stream,
        record_stream=stream,
    )


def _cpu_offload(model: nn.Module, device: torch.device) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=device)


def _mmgp(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """Its profile 2, which keeps the model page-locked and only what is needed on the device."""
    from mmgp import offload

    for module in model.modules():
        module._lock_dtype = True  # What is packed and what is not have dtypes of their own, and keep them.
    try:
        loaded = offload.profile({"transformer": model}, 2, quantizeTransformer=False)
    finally:
        torch.set_default_device(None)  # It makes the device the default for all that comes after it.
    return loaded.release


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("diffusers", "accelerate", "mmgp"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

"""Which layers of a network depend on nothing but some arguments of its forward, and when those come
again."""

from __future__ import annotations

import inspect
import re
from collections.abc import Hashable, Mapping, Sequence
from types import CodeType
from typing import Any

import torch

from lib_qswap.quant import kernels
from lib_qswap.swap.layer import Layer

FLUX_LAYERS = (
    r"(^|\.)(time_in|vector_in|guidance_in)\.(in|out)_layer$"
    r"|(^|\.)(img_mod|txt_mod|modulation)\.lin$"
    r"|(^|\.)final_layer\.adaLN_modulation\.1$"
)


class Conditioning:
    """What some layers of a network depend on, and on nothing else: arguments of its forward.

    Equal arguments are recognised by their bytes on the host, never by comparing tensors on the device. They
    are read once a step, a few kilobytes at its beginning, where samplers wait for the device themselves.
    """

    def __init__(self, arguments: Sequence[str], others: Sequence[str], layers: str) -> None:
        """Args:
        arguments: the names of what the layers depend on.
        others: those of the rest; a forward with any other argument is one of which nothing is known.
        layers: a pattern (`re.search`) for the names of the layers.
        """
        self.arguments = tuple(arguments)
        self._known = {*arguments, *others}
        self._pattern = re.compile(layers)

    def covers(self, layer: Layer) -> bool:
        return self._pattern.search(layer.name) is not None

    def fits(self, network: torch.nn.Module) -> bool:
        """Whether the forward of `network` is, at this moment, like the one that this was written for:
        somebody may have put another in its place."""
        names = set(_arguments(_code(network, "forward")))
        return names.issuperset(self.arguments) and names <= self._known

    def key(
        self, network: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device
    ) -> Hashable:
        """Equal for two forwards of `network` on `device` whose layers compute the same; None: not known."""
        forward = _code(network, "forward")
        names = _arguments(forward)
        if not self.fits(network) or len(args) > len(names):
            return None
        if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
            return None
        named = dict(zip(names, args)) | dict(kwargs)  # noqa: B905 (defaults are left out)
        if not named.keys() <= self._known:
            return None
        try:
            values = _described([named.get(name) for name in self.arguments])
        except (RuntimeError, TypeError, ValueError):  # Whatever it is: not known.
            return None
        # What the inputs are cast to follows from the dtypes of all.
        dtypes = tuple(value.dtype for value in named.values() if isinstance(value, torch.Tensor))
        # Products in one kernel round otherwise than others; and some programs leave a forward early.
        return values, dtypes, kernels.in_use(device), forward, _code(network, "inner_forward")


FLUX = Conditioning(
    ("timestep", "y", "guidance"), ("x", "context", "control", "transformer_options"), FLUX_LAYERS
)
"""Flux's network, with the names of Forge's."""

SD3 = Conditioning(
    ("t", "y"),
    ("x", "context", "control", "transformer_options"),
    r"(^|\.)(t_embedder|y_embedder)\.mlp\.[02]$|(^|\.)adaLN_modulation\.1$",
)
"""Stable Diffusion 3's, with the names of Forge's."""


def _code(network: torch.nn.Module, name: str) -> CodeType | None:
    """The code of a method: tells one function from another, and holds on to nothing."""
    code = getattr(getattr(type(network), name, None), "__code__", None)
    return code if isinstance(code, CodeType) else None


def _arguments(code: CodeType | None) -> tuple[str, ...]:
    """The names of what a method takes, in order, without those of a collection; none for one that takes any
    number in order, of which a name says nothing."""
    if code is None or code.co_flags & inspect.CO_VARARGS:
        return ()
    return code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]


def _described(values: Sequence[Any]) -> Hashable:
    """Numbers, and the bytes of tensors, which are read from their devices at once.

    Raises:
        TypeError: another kind of value.
        RuntimeError: a tensor that has no bytes, or a device that cannot give them.
    """
    described: list[Hashable] = []
    flat: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            described.append((value.dtype, value.shape))
            flat.append(value.detach().contiguous().reshape(-1).view(torch.uint8))
        elif value is None or isinstance(value, (int, float)):
            described.append(repr(value))
        else:
            raise TypeError(f"{type(value).__name__} is no number and no tensor")
    if len({one.device for one in flat}) > 1:
        flat = [one.cpu() for one in flat]
    return tuple(described), torch.cat(flat).cpu().numpy().tobytes() if flat else b""

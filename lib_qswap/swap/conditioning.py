"""Which layers of a network depend on nothing but some arguments of its forward, and when those come
again."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple, TypeAlias

import torch

from lib_qswap.quant import kernels
from lib_qswap.swap.layer import Layer

FLUX_LAYERS = (
    r"(^|\.)(time_in|vector_in|guidance_in)\.(in|out)_layer$"
    r"|(^|\.)(img_mod|txt_mod|modulation)\.lin$"
    r"|(^|\.)final_layer\.adaLN_modulation\.1$"
)


Value: TypeAlias = "str | tuple[torch.dtype, torch.Size, bytes]"
"""An argument that can be compared: a number as Python writes it, a tensor's bytes, or None."""

Arguments: TypeAlias = "dict[str, Any]"
Least: TypeAlias = Callable[[Arguments, int], Arguments]


class Key(NamedTuple):
    """Equal for two forwards whose layers compute the same.

    Attributes:
        values: of the arguments that they depend on; the first one's change from step to step.
        rest: what else matters: dtypes, kernels, code.
    """

    values: tuple[Value, ...]
    rest: Hashable

    @property
    def time(self) -> Value:
        return self.values[0]

    @property
    def description(self) -> Hashable:
        """Equal for steps that differ in nothing but the values of tensors."""
        return tuple(one if isinstance(one, str) else one[:2] for one in self.values)

    def at(self, time: Value) -> Key:
        """Of the same step at another time."""
        return self._replace(values=(time, *self.values[1:]))


class Asked(NamedTuple):
    """What a forward was asked for: its arguments, by name, and their key."""

    network: torch.nn.Module
    named: Arguments
    key: Key


class Conditioning:
    """What some layers of a network depend on, and on nothing else: arguments of its forward.

    Equal arguments are recognised by their bytes on the host, never by comparing tensors on the device. They
    are read once a step, a few kilobytes at its beginning, where samplers wait for the device themselves.
    """

    def __init__(
        self, arguments: Sequence[str], others: Sequence[str], layers: str, *, least: Least | None = None
    ) -> None:
        """Args:
        arguments: the names of what the layers depend on, that of the time step first.
        others: those of the rest; a forward with any other argument is one of which nothing is known.
        layers: a pattern (`re.search`) for the names of the layers.
        least: given a forward's arguments, by name, and a number, the least others with which a forward
            can be run, that many batches of them; None: not known.
        """
        self.arguments = tuple(arguments)
        self.least = least
        self._known = {*arguments, *others}
        self._pattern = re.compile(layers)

    def covers(self, layer: Layer) -> bool:
        return self._pattern.search(layer.name) is not None

    def fits(self, network: torch.nn.Module) -> bool:
        """Whether the forward of `network` is, at this moment, like the one that this was written for:
        somebody may have put another in its place."""
        names = set(_arguments(_code(network, "forward")))
        return names.issuperset(self.arguments) and names <= self._known

    def is_own(self, network: torch.nn.Module) -> bool:
        """Whether what computes is the code that the network's class was written with: what others put in
        its place may count its calls."""
        file = getattr(sys.modules.get(type(network).__module__), "__file__", None) or ""
        codes = [_code(network, name) for name in ("forward", "inner_forward")]
        return all(code is None or Path(code.co_filename).resolve() == Path(file).resolve() for code in codes)

    def asked(
        self, network: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device
    ) -> Asked | None:
        """What a forward of `network` on `device` is asked for; None: it is none that is known."""
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
        rest = dtypes, kernels.in_use(device), forward, _code(network, "inner_forward")
        return Asked(network, named, Key(values, rest))

    def key(
        self, network: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device
    ) -> Key | None:
        """That of `asked`."""
        asked = self.asked(network, args, kwargs, device)
        return None if asked is None else asked.key

    def batch(self, asked: Asked) -> int:
        """How many pictures it asks for.

        Raises:
            ValueError: the time step is no tensor.
        """
        time = asked.named[self.arguments[0]]
        if not isinstance(time, torch.Tensor) or time.dim() != 1:
            raise ValueError("the time step is no vector")
        return len(time)

    def arguments_of(self, asked: Asked, keys: Sequence[Key]) -> Arguments:
        """Those of a forward with a batch for each of `keys`, and the least of everything else.

        Raises:
            ValueError: there are no such arguments.
        """
        assert self.least is not None
        found = self.least(asked.named, len(keys))
        for place, name in enumerate(self.arguments):
            values = [key.values[place] for key in keys]
            if name not in asked.named:
                continue
            if any(isinstance(value, str) for value in values):
                if values != values[:1] * len(values):
                    raise ValueError(f"{name} is a number")
                found[name] = asked.named[name]
            else:
                together = torch.cat([_tensor(value) for value in values])
                found[name] = together.to(asked.named[name].device)
        return found


def _of_forge(named: Arguments, count: int) -> Arguments:
    """One patch of a picture, of 2 x 2, and one token of a text."""
    x, context = named["x"][..., :2, :2], named["context"][:, :1]
    return {"x": x.repeat(count, 1, 1, 1), "context": context.repeat(count, 1, 1)}


FLUX = Conditioning(
    ("timestep", "y", "guidance"),
    ("x", "context", "control", "transformer_options"),
    FLUX_LAYERS,
    least=_of_forge,
)
"""Flux's network, with the names of Forge's."""

SD3 = Conditioning(
    ("t", "y"),
    ("x", "context", "control", "transformer_options"),
    r"(^|\.)(t_embedder|y_embedder)\.mlp\.[02]$|(^|\.)adaLN_modulation\.1$",
    least=_of_forge,
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


def _described(values: Sequence[Any]) -> tuple[Value, ...]:
    """Numbers, and the bytes of tensors, which are read from their devices at once.

    Raises:
        TypeError: another kind of value.
        RuntimeError: a tensor that has no bytes, or a device that cannot give them.
    """
    flat: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            flat.append(_bytes_of(value))
        elif value is not None and not isinstance(value, (int, float)):
            raise TypeError(f"{type(value).__name__} is no number and no tensor")
    if len({one.device for one in flat}) > 1:
        flat = [one.cpu() for one in flat]
    joined = torch.cat(flat).cpu().numpy().tobytes() if flat else b""
    described: list[Value] = []
    start = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            end = start + value.numel() * value.element_size()
            described.append((value.dtype, value.shape, joined[start:end]))
            start = end
        else:
            described.append(repr(value))
    return tuple(described)


def value_of(tensor: torch.Tensor) -> Value:
    """A tensor on the CPU as an argument of a key."""
    return tensor.dtype, tensor.shape, _bytes_of(tensor).numpy().tobytes()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """uint8, flat; a view where it can be one."""
    flat = tensor.detach().contiguous().reshape(-1)
    # A single number counts as contiguous whatever its stride is: 0 where it was expanded.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def _tensor(value: Value) -> torch.Tensor:
    """Its bytes as a tensor again, on the CPU."""
    if isinstance(value, str):
        raise TypeError(f"{value} is no tensor")
    dtype, shape, content = value
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)

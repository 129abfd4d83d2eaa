"""Outputs that the next image of the same prompt asks for again, kept in RAM instead of computed again.

Flux's modulation layers have a quarter of its weights, and see one token, which is made of the time step, the
guidance and the pooled text. For another image of the same prompt and schedule they give the same outputs as
for the one before: two megabytes a step, where their weights are a gigabyte or more. A step whose outputs are
all there runs without these layers, and nothing is fetched for them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lib_qswap.quant import kernels
from lib_qswap.swap.arena import HostBuffer
from lib_qswap.swap.device import Device, align

if TYPE_CHECKING:
    from lib_qswap.swap.home import PinBudget
    from lib_qswap.swap.layer import Layer

SHARE_OF_WEIGHTS = 8
"""What is kept takes at most this part of the bytes that its layers' weights have."""

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
        """Whether the forward of `network` is the one that this was written for."""
        names = set(_parameters(network))
        return names.issuperset(self.arguments) and names <= self._known

    def key(self, network: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
        """Equal for two forwards of `network` whose layers get the same inputs; None: not known."""
        named = dict(zip(_parameters(network), args)) | dict(kwargs)  # noqa: B905 (defaults are left out)
        if not named.keys() <= self._known:
            return None
        values = [named.get(name) for name in self.arguments]
        if not all(value is None or isinstance(value, (torch.Tensor, int, float)) for value in values):
            return None
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        # What the inputs are cast to follows from the dtypes of all.
        dtypes = tuple(value.dtype for value in named.values() if isinstance(value, torch.Tensor))
        numbers = tuple(value for value in values if not isinstance(value, torch.Tensor))
        return (*numbers, dtypes, *(tensor.shape for tensor in tensors), _bytes_of(tensors))


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


def _parameters(network: torch.nn.Module) -> tuple[str, ...]:
    return _parameters_of(type(network).forward)


@functools.lru_cache(maxsize=16)
def _parameters_of(forward: Any) -> tuple[str, ...]:
    """The names of what a method takes, in order, without those of a collection."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind not in kinds)


def _bytes_of(tensors: Sequence[torch.Tensor]) -> bytes:
    if not tensors:
        return b""
    flat = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
    if len({one.device for one in flat}) > 1:
        flat = [one.cpu() for one in flat]
    return torch.cat(flat).cpu().numpy().tobytes()


class _Place(NamedTuple):
    """Where one layer's output is among those of its step."""

    start: int
    nbytes: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[self.start : self.start + self.nbytes].view(self.dtype).view(self.shape)


class _Kept:
    """The outputs of one step; `ready`: the event after which they are in `memory`."""

    __slots__ = ("asked", "memory", "places", "ready")

    def __init__(self, memory: torch.Tensor, places: dict[Layer, _Place], ready: Any, asked: int) -> None:
        self.memory, self.places, self.ready, self.asked = memory, places, ready, asked


class KeptOutputs:
    """The outputs of `layers`, for every conditioning that was seen lately.

    Attributes:
        layers: those that are computed from the conditioning alone.
        nbytes: host memory that the outputs take.
    """

    def __init__(self, layers: Iterable[Layer], device: Device, pin_budget: PinBudget) -> None:
        self.layers = frozenset(layers)
        self.nbytes = 0
        self._device = device
        self._pin_budget = pin_budget
        self._limit_bytes = sum(layer.payload_bytes for layer in self.layers) // SHARE_OF_WEIGHTS
        self._kept: dict[Hashable, _Kept] = {}
        self._asked = self._in_a_row = 0
        self._key: Hashable = None
        self._outputs: dict[Layer, torch.Tensor] = {}
        self._served: dict[Layer, torch.Tensor] = {}

    def has(self, key: Hashable) -> bool:
        """Whether the outputs for this conditioning are kept."""
        return self._full_key(key) in self._kept

    def serves(self, key: Hashable) -> bool:
        """Whether a step of this conditioning is to do without `layers`: where it was seen before, as was
        that of the last step. Another plan for a single step costs more than it saves, and a sampler of
        second order comes to every time but the first twice."""
        return self._in_a_row > 0 and self.has(key)

    def begin(self, key: Hashable, *, served: bool) -> None:
        """A step begins, of the conditioning `key` (None: not known); `served`: its outputs are those that
        were kept."""
        self.abandon()
        found = None if key is None else self._kept.get(self._full_key(key))
        self._in_a_row = 0 if found is None else self._in_a_row + 1
        self._asked += 1
        if found is not None:
            found.asked = self._asked
            if served:
                self._serve(found)
        elif key is not None:
            self._key = self._full_key(key)

    def _serve(self, found: _Kept) -> None:
        found.ready.wait(self._device.current_stream())
        try:
            memory = torch.empty(found.memory.numel(), dtype=torch.uint8, device=self._device.device)
        except torch.cuda.OutOfMemoryError:  # the name that torch 2.3 has as well, for every device
            return  # The layers compute it again, fetched out of order.
        memory.copy_(found.memory, non_blocking=True)
        self._served = {layer: place.view(memory) for layer, place in found.places.items()}

    def output(self, layer: Layer) -> torch.Tensor | None:
        """What `layer` computes in this step, where that was kept."""
        return self._served.get(layer)

    def keep(self, layer: Layer, output: Any) -> None:
        """`layer` has computed `output` in this step."""
        if self._key is None or layer in self._outputs:
            return
        if isinstance(output, torch.Tensor):
            # Whoever gets it may write into it.
            self._outputs[layer] = output.detach().clone(memory_format=torch.contiguous_format)

    def end(self) -> None:
        """The step is over: what it has computed is kept, if that was all."""
        if self._key is not None and self._outputs.keys() == self.layers:
            # Without memory for it, the next image computes it again.
            with contextlib.suppress(torch.cuda.OutOfMemoryError, MemoryError, OSError):
                self._store(self._key, self._outputs)
        self.abandon()

    def abandon(self) -> None:
        """What the step has computed so far is forgotten, and it is not served any more."""
        self._key = None
        self._outputs, self._served = {}, {}

    def restart(self) -> None:
        """The step begins again."""
        self._outputs = {}

    def clear(self) -> None:
        """The layers are others now, or compute otherwise."""
        self.abandon()
        if self._kept:
            self._device.synchronize()  # It may be copying them.
            self._kept.clear()
            self.nbytes = 0

    def _full_key(self, key: Hashable) -> Hashable:
        return key, kernels.in_use(self._device.device)  # Products in one kernel round otherwise.

    def _store(self, key: Hashable, outputs: dict[Layer, torch.Tensor]) -> None:
        places: dict[Layer, _Place] = {}
        start = 0
        for layer, output in outputs.items():
            nbytes = output.numel() * output.element_size()
            places[layer] = _Place(start, nbytes, output.shape, output.dtype)
            start += align(nbytes)
        if not self._make_room(start):
            return
        buffer = HostBuffer.of(start)
        memory = torch.frombuffer(buffer, dtype=torch.uint8)
        if self._device.can_page_lock and self._device.can_register:
            buffer.lock(self._device, self._pin_budget, memory)  # Refused, it is only slower.
        together = torch.empty(start, dtype=torch.uint8, device=self._device.device)
        for layer, place in places.items():
            place.view(together).copy_(outputs[layer])
        memory.copy_(together, non_blocking=True)
        ready = self._device.new_event()
        ready.record(self._device.current_stream())
        self._kept[key] = _Kept(memory, places, ready, self._asked)
        self.nbytes += start

    def _make_room(self, nbytes: int) -> bool:
        """Lets go of what no step has asked for lately, as far as `nbytes` need it. Steps come in cycles, in
        which what was asked for longest ago is asked for next: being the oldest is no reason."""
        recent = self._asked - 2 * len(self._kept) - 1
        for key, kept in sorted(self._kept.items(), key=lambda item: item[1].asked):
            if self.nbytes + nbytes <= self._limit_bytes or kept.asked > recent:
                break
            kept.ready.synchronize()
            self.nbytes -= kept.memory.numel()
            del self._kept[key]
        return self.nbytes + nbytes <= self._limit_bytes


class KeptForward:
    """The forward of such a layer: what it gave before, or its own.

    Args:
        own: of the module, called with it first; None: its class's, whatever that is at the time.
    """

    def __init__(self, layer: Layer, own: Callable[..., Any] | None, kept: KeptOutputs) -> None:
        self._layer, self._own, self._kept = layer, own, kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self._kept.output(self._layer)
        if found is not None:
            return found
        module = self._layer.module()
        if module is None:
            raise ReferenceError(f"{self._layer.name}: its module is gone")
        output = (self._own or type(module).forward)(module, *args, **kwargs)
        self._kept.keep(self._layer, output)
        return output

"""Outputs that the next image of the same prompt asks for again, kept in RAM instead of computed again.

Flux's modulation layers have a quarter of its weights, and see one token, which is made of the time step, the
guidance and the pooled text. For another image of the same prompt and schedule they give the same outputs as
for the one before: two megabytes a step, where their weights are a gigabyte or more. A step whose outputs are
all there runs without these layers, and nothing is fetched for them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lib_qswap.swap.conditioning import Key
from lib_qswap.swap.device import align

if TYPE_CHECKING:
    from lib_qswap.swap.layer import Layer
    from lib_qswap.swap.look_ahead import Rehearsal

SHARE_OF_WEIGHTS = 8
"""What is kept takes at most this part of the bytes that its layers' weights have."""

KEPT_FOR_STEPS = 200
"""What no step has asked for in so many is let go."""

SHORT_STRETCH = 3
"""Fewer steps that are served one after the other do not pay for the other plan."""

MOST_IN_A_ROW = 64
"""Steps that have to be known, one after the other, before another is served: never more than these."""


class _Place(NamedTuple):
    """Where one layer's output is among those of its step."""

    start: int
    nbytes: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[self.start : self.start + self.nbytes].view(self.dtype).view(self.shape)


class _Kept:
    """The outputs of one step, and the step that asked for them last."""

    __slots__ = ("asked", "memory", "places")

    def __init__(self, memory: torch.Tensor, places: dict[Layer, _Place], asked: int) -> None:
        self.memory, self.places, self.asked = memory, places, asked


class KeptOutputs:
    """The outputs of `layers`, for every conditioning that was seen lately.

    Attributes:
        layers: those that are computed from the conditioning alone.
        nbytes: RAM that the outputs take.
        rehearsal: what runs the layers now, instead of a step.
    """

    def __init__(self, layers: Iterable[Layer], device: torch.device) -> None:
        self.layers = frozenset(layers)
        self.nbytes = 0
        self.rehearsal: Rehearsal | None = None
        self._device = device
        self._limit_bytes = sum(layer.payload_bytes for layer in self.layers) // SHARE_OF_WEIGHTS
        self._kept: dict[Hashable, _Kept] = {}
        self._step_bytes = 0
        self._asked = 0
        self._known_in_a_row, self._served_in_a_row, self._needed_in_a_row = 0, 0, 1
        self._key: Hashable = None
        self._outputs: dict[Layer, torch.Tensor] = {}
        self._serving: _Kept | None = None
        self._served: dict[Layer, torch.Tensor] = {}

    def begin_run(self) -> None:
        """What was stored ahead for a run before, which may have been broken off, is to come no more."""
        for kept in self._kept.values():
            kept.asked = min(kept.asked, self._asked)

    def begin(self, key: Hashable, *, may_serve: bool = True) -> bool:
        """A step begins, of the conditioning `key` (None: not known). Returns whether it is served what was
        kept, and does without `layers`.

        That is where its conditioning was seen before, as were those before it: another plan for a single
        step costs more than it saves. Where steps are served and soon after not, as for a sampler of second
        order, or a prompt of which a part changes, it takes twice as many of them in a row the next time.
        """
        self.abandon()
        self._asked += 1
        found = None if key is None else self._kept.get(key)
        if found is None:
            self._note_stretch()
            if key is not None and self._make_room(self._step_bytes):
                self._key = key
            return False
        found.asked = self._asked
        self._known_in_a_row += 1
        if may_serve and self._known_in_a_row > self._needed_in_a_row:
            self._serving = found
            if self._serve():
                self._served_in_a_row += 1
                return True
        return False

    def _note_stretch(self) -> None:
        if self._served_in_a_row >= SHORT_STRETCH:
            self._needed_in_a_row = 1
        elif self._served_in_a_row:
            self._needed_in_a_row = min(MOST_IN_A_ROW, 2 * self._needed_in_a_row)
        self._known_in_a_row = self._served_in_a_row = 0

    def _serve(self) -> bool:
        assert self._serving is not None
        kept = self._serving
        try:
            memory = torch.empty(kept.memory.numel(), dtype=torch.uint8, device=self._device)
        except torch.cuda.OutOfMemoryError:  # the name that torch 2.3 has as well, for every device
            self._serving = None
            return False
        memory.copy_(kept.memory)
        self._served = {layer: place.view(memory) for layer, place in kept.places.items()}
        return True

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    @property
    def most_steps(self) -> int:
        """Of how many steps the outputs can be kept; 0 where none has been yet."""
        return self._limit_bytes // self._step_bytes if self._step_bytes else 0

    def like(self, key: Key) -> Key | None:
        """That of another step that differs from `key` in nothing but the values of tensors."""
        for other in reversed(self._kept):
            if isinstance(other, Key) and (other.rest, other.description) == (key.rest, key.description):
                return other
        return None

    def outputs_of(self, key: Hashable) -> dict[Layer, torch.Tensor]:
        """What is kept for `key`, on the CPU."""
        kept = self._kept[key]
        return {layer: place.view(kept.memory) for layer, place in kept.places.items()}

    def store_ahead(self, keys: Sequence[Hashable], outputs: dict[Layer, torch.Tensor]) -> None:
        """The outputs of steps to come, `keys`, one behind the other for each layer: of as many as there is
        room for. These are asked for next: what was asked for longest ago makes room, but not what was
        stored ahead and is still to come."""
        to_come = sum(kept.memory.numel() for kept in self._kept.values() if kept.asked > self._asked)
        keys = keys[: max(0, self._limit_bytes - to_come) // self._step_bytes]
        by_age = sorted(self._kept, key=lambda key: self._kept[key].asked)
        while by_age and self.nbytes + len(keys) * self._step_bytes > self._limit_bytes:
            self._drop(by_age.pop(0))
        for place, key in enumerate(keys):
            self._store(key, {layer: output[place] for layer, output in outputs.items()})
            if key in self._kept:
                self._kept[key].asked = self._asked + 1 + place
        # They are served at once.
        self._known_in_a_row = MOST_IN_A_ROW

    def output(self, layer: Layer) -> torch.Tensor | None:
        """What `layer` computes in this step, where that was kept; once."""
        return self._served.pop(layer, None)

    def keep(self, layer: Layer, output: Any) -> None:
        """`layer` has computed `output` in this step."""
        if self._key is None:
            return
        if layer in self._outputs or not isinstance(output, torch.Tensor):
            self._key = None  # No forward that is understood.
            self._outputs = {}
        else:
            # Whoever gets it may write into it.
            self._outputs[layer] = output.detach().clone(memory_format=torch.contiguous_format)

    def end(self) -> None:
        """The step is over: what it has computed is kept, if that was all."""
        if self._key is not None and self._outputs.keys() == self.layers:
            # Without memory for it, the next image computes it again. (Without RAM torch raises no more than
            # this.)
            with contextlib.suppress(RuntimeError, MemoryError):
                self._store(self._key, self._outputs)
        self.abandon()

    def abandon(self) -> None:
        """What the step has computed so far is forgotten, and it is not served any more."""
        self._key = self._serving = None
        self._outputs, self._served = {}, {}

    def restart(self) -> None:
        """The step begins again."""
        self._outputs, self._served = {}, {}
        if self._serving is not None:
            self._serve()

    def clear(self) -> None:
        """The layers are others now, or compute otherwise."""
        self.abandon()
        self._note_stretch()
        self._kept.clear()
        self.nbytes = self._step_bytes = 0

    def _store(self, key: Hashable, outputs: dict[Layer, torch.Tensor]) -> None:
        places: dict[Layer, _Place] = {}
        start = 0
        for layer, output in outputs.items():
            nbytes = output.numel() * output.element_size()
            places[layer] = _Place(start, nbytes, output.shape, output.dtype)
            start += align(nbytes)
        if key in self._kept:
            self._drop(key)
        if self._make_room(start):
            device = next(iter(outputs.values())).device
            together = torch.empty(start, dtype=torch.uint8, device=device)
            for layer, place in places.items():
                place.view(together).copy_(outputs[layer])
            # Ordinary RAM, for which the host waits here: it would wait at the next step's beginning.
            memory = together.cpu()
            self._kept[key] = _Kept(memory, places, self._asked)
            self.nbytes += start
            self._step_bytes = start

    def _make_room(self, nbytes: int) -> bool:
        """Lets go of what no step has asked for lately; returns whether `nbytes` more may be kept. Steps come
        in cycles, in which what was asked for longest ago is asked for next: being the oldest is no
        reason."""
        if nbytes > self._limit_bytes:
            return False
        old = self._asked - KEPT_FOR_STEPS
        not_in_the_cycle = self._asked - 2 * len(self._kept) - 1
        for key, kept in sorted(self._kept.items(), key=lambda item: item[1].asked):
            lacking = self.nbytes + nbytes > self._limit_bytes
            if kept.asked >= old and not (lacking and kept.asked <= not_in_the_cycle):
                break
            self._drop(key)
        return self.nbytes + nbytes <= self._limit_bytes

    def _drop(self, key: Hashable) -> None:
        self.nbytes -= self._kept.pop(key).memory.numel()


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
        own = self._own or type(module).forward
        if self._kept.rehearsal is not None:
            return self._kept.rehearsal.run(self._layer, functools.partial(own, module), args, kwargs)
        output = own(module, *args, **kwargs)
        self._kept.keep(self._layer, output)
        return output

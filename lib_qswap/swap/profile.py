"""What a step takes, measured in the first steps of every shape of the work, and whether another plan pays.

A hires pass, a larger batch or a longer prompt changes how long each layer computes, and with it which layers
had better be resident; and how much memory a step needs beside the weights.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lib_qswap.swap import planner
from lib_qswap.swap.device import Device
from lib_qswap.swap.layer import Layer, Measured
from lib_qswap.swap.planner import LayerCost, Plan

MEASURED_STEPS = 2
"""Steps of each work that are measured: the first one also compiles kernels and fills caches."""

KEPT_WORKS = 32

MIN_GAIN = 0.005
"""A plan from measured times replaces the present one only if it predicts a step that is this share
shorter."""

CHANGE_COST = 1.1
"""A change takes this much longer than copying what becomes resident: memory is allocated for it, and what
was fetched ahead is dropped. So it never pays for one step, in which a layer travels either way."""

ASSUMED_STEPS_LEFT = 8
ASSUMED_FLOPS = 20e12
ASSUMED_TOKENS = 4096
ASSUMED_UNPACKING = 0.05
"""What a plan is made from until the first steps are measured: a mid-range card at 1024 x 1024, and how much
of a layer's time goes into unpacking its weight."""


class Work(NamedTuple):
    """What a forward is asked for: equal works take equally long."""

    root: Hashable
    shapes: tuple[torch.Size, ...]


def work_of(root: Hashable, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Work:
    """The work of a forward of `root` with these arguments: the shapes of the tensors among them."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return Work(root, tuple(tensor.shape for tensor in tensors))


class Need(NamedTuple):
    """Device memory; not `is_exact`: no more than that."""

    nbytes: int
    is_exact: bool


class Profile:
    """The measured times of one model's layers, and the memory that its steps need, by work."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._begun: dict[Work, int] = {}
        self._again: set[Work] = set()
        self._lost: dict[Work, int] = {}
        self._needs: dict[Work, Need] = {}
        self._in_use: dict[Hashable, Work] = {}
        self._open: tuple[Work, int, int] | None = None

    def has_measured(self, work: Work) -> bool:
        """Whether another forward of it has no need to be."""
        return self._knows_need(work) and work not in self._again

    def _knows_need(self, work: Work) -> bool:
        return self._begun.get(work, 0) == MEASURED_STEPS

    def measure_again(self, work: Work) -> None:
        """The times of its measured steps are lost: another one is measured, a few times at most."""
        self._lost[work] = self._lost.get(work, 0) + 1
        if self._lost[work] <= MEASURED_STEPS:
            self._again.add(work)

    def begin(self, work: Work, layers: Sequence[Layer]) -> None:
        """A forward begins that is to be measured."""
        self.close()
        if work not in self._begun and len(self._begun) == KEPT_WORKS:
            oldest = next(iter(self._begun))
            del self._begun[oldest]
            self._needs.pop(oldest, None)
            self._lost.pop(oldest, None)
            self._again.discard(oldest)
            for layer in layers:
                layer.times.by_work.pop(oldest, None)
        if not self._knows_need(work):
            self._begun[work] = self._begun.get(work, 0) + 1
        self._again.discard(work)
        allocated_bytes = self._device.allocated_bytes()
        if allocated_bytes is not None:
            self._open = work, allocated_bytes, self._device.peak_allocated_bytes()

    def close(self) -> None:
        """A measured step, with what its host does between steps, is over: its memory is what the peak rose
        to. Where something else had taken more before, that is a bound."""
        if self._open is not None:
            work, had, peak_before = self._open
            self._open = None
            peak = self._device.peak_allocated_bytes()
            need = Need(peak - had, peak > peak_before)
            known = self._needs.get(work)
            if known is None or known.is_exact < need.is_exact:
                self._needs[work] = need
            elif known.is_exact == need.is_exact:
                self._needs[work] = max(known, need)

    def forget(self, root: Hashable) -> None:
        """The forward of `root` was broken off: what is known of it is measured again."""
        self._open = None
        for work in [work for work in self._begun if work.root == root]:
            del self._begun[work]
            self._needs.pop(work, None)
            self._lost.pop(work, None)
            self._again.discard(work)
        self._in_use.pop(root, None)

    def need(self, work: Work) -> Need | None:
        """What a step of `work` takes on the device beside what was there before it; None: not measured
        yet."""
        return self._needs.get(work) if self._knows_need(work) else None

    def is_in_use(self, work: Work) -> bool:
        """Whether the layers' `compute_s` are those of `work`."""
        return self._in_use.get(work.root) == work

    def reconsider(self) -> None:
        """The next step of every known work is to look for a better plan: something has changed."""
        self._in_use.clear()

    def use(self, work: Work, layers: Sequence[Layer]) -> bool:
        """Takes over what was measured for `work` into the layers' times. Returns whether anything has been
        read of it yet."""
        measured = [layer for layer in layers if work in layer.times.by_work]
        if not measured:
            return False
        self._in_use[work.root] = work
        for layer in measured:
            layer.times.measured = layer.times.by_work[work]
        return True


def costs(layers: Sequence[Layer]) -> list[LayerCost]:
    """What the planner wants to know of each layer; times that are not measured yet are guessed."""
    return [LayerCost(layer.name, layer.payload_bytes, *_times(layer)) for layer in layers]


def _times(layer: Layer) -> Measured:
    if layer.times.measured is not None:
        return layer.times.measured
    compute_s = 2 * layer.elements * ASSUMED_TOKENS / ASSUMED_FLOPS
    is_packed = any(part.dtype_on_device is None for part in layer.parts)
    return Measured(compute_s, compute_s * ASSUMED_UNPACKING if is_packed else compute_s)


class Gain(NamedTuple):
    """What another plan saves a step, and what moving residents for it costs once, in seconds."""

    step_s: float
    moving_s: float

    def pays_within(self, steps: int | None) -> bool:
        """Whether it is worth it for a run that has `steps` left (None: not known)."""
        return self.step_s * (ASSUMED_STEPS_LEFT if steps is None else steps) > CHANGE_COST * self.moving_s


def gain(plan: Plan, present: Plan, layers: Sequence[Layer], link_bytes_per_s: float) -> Gain | None:
    """What `plan` saves by today's times; None: too little to be sure of."""
    now_s = planner.predict_step(
        costs(layers), present.resident, ring_bytes=present.ring_bytes, link_bytes_per_s=link_bytes_per_s
    )
    if now_s - plan.step_s < MIN_GAIN * now_s:
        return None
    wanted = set(plan.resident)
    moved = sum(layer.payload_bytes for layer in layers if layer.resident is None and layer.name in wanted)
    return Gain(now_s - plan.step_s, moved / link_bytes_per_s)

"""What the last steps did, from device events: seconds, stalls, and the trace that a profiler page can draw.

Events are recorded in a step and read when they have happened, steps later: nothing here waits for the
device.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable
from typing import Any, NamedTuple

from lib_qswap.swap.copier import Transfer
from lib_qswap.swap.device import Device
from lib_qswap.swap.layer import Layer, Measured

KEPT_STEPS = 8


class Use(NamedTuple):
    """One use of a layer: events on the compute stream before and after it waited for its weights."""

    layer: Layer
    begun: Any
    served: Any
    transfer: Transfer | None


class StepTimes(NamedTuple):
    """One finished forward of a model.

    seconds: from its begin to its end on the compute stream; stall_s: how long it waited for weights;
        copy_s, h2d_bytes: how long the copy stream spent on the transfers used in it, and what they brought,
        without those that made layers resident; marks: what `spans` is made from.
    """

    root: Hashable
    seconds: float
    stall_s: float
    copy_s: float
    h2d_bytes: int
    base: Any
    marks: list[tuple[str, Any, Any, Any, Any]]

    def spans(self) -> list[tuple[str, float, float, float | None, float | None]]:
        """(layer, begin, served, copy begin, copy end) in seconds since the begin of the step. A copy may
        have begun in the step before: a negative time."""
        return [(name, *(self._since(event) for event in events)) for name, *events in self.marks]

    def _since(self, event: Any) -> Any:
        return None if event is None else self.base.elapsed_time(event) * 1e-3


class _Step:
    __slots__ = ("base", "end", "measured", "reads", "root", "uses")

    def __init__(self, root: Hashable, base: Any, measured: Hashable) -> None:
        self.root, self.base, self.measured = root, base, measured
        self.end: Any = None
        self.uses: list[Use] = []
        self.reads: dict[Layer, list[Any]] = {}


class Timeline:
    """Records steps on one device.

    Attributes:
        profiling: whether this step also records the layers that need no transfer.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._step: _Step | None = None
        self._waiting: deque[_Step] = deque(maxlen=16)
        self.profiling = False
        self.finished: deque[StepTimes] = deque(maxlen=KEPT_STEPS)

    def begin(self, root: Hashable, measured: Hashable = None) -> None:
        """A forward of `root` begins. `measured`: the work whose times are taken in it, if any."""
        if self._step is not None:  # Its forward raised, or another model's runs inside it.
            self._step = None
        self.collect()
        self._step = _Step(root, self.mark(self._device.current_stream()), measured)
        self.profiling = measured is not None

    def end(self, root: Hashable) -> list[Layer] | None:
        """The forward of `root` is over. Returns the layers in the order of their first use, where it was
        measured."""
        step = self._step
        if step is None or step.root != root:
            return None
        step.end = self.mark(self._device.current_stream())
        self._waiting.append(step)
        self._step, self.profiling = None, False
        return None if step.measured is None else list(dict.fromkeys(use.layer for use in step.uses))

    def forget(self) -> None:
        """The steps that have not been read yet are dropped, and with them what they hold on to."""
        self.collect()
        self._waiting.clear()
        self._step, self.profiling = None, False

    def mark(self, stream: Any) -> Any:
        """A point in time on `stream`."""
        event = self._device.new_event(timing=True)
        self._device.record(event, stream)
        return event

    def used(self, layer: Layer, transfer: Transfer | None, stream: Any, begun: Any = None) -> None:
        """`layer` computes from now on; it has waited for `transfer` since `begun`."""
        served = self.mark(stream)
        if transfer is not None:
            transfer.served = served
        if self._step is not None:
            self._step.uses.append(Use(layer, begun if begun is not None else served, served, transfer))

    def read(self, layer: Layer, event: Any = None) -> None:
        """What reads the weights of `layer` has been issued: up to `event`, or to now."""
        if self._step is not None and self.profiling:
            if event is None:
                event = self.mark(self._device.current_stream())
            self._step.reads.setdefault(layer, []).append(event)

    @property
    def is_over(self) -> bool:
        """Whether the device has done all steps that have begun. Any thread may ask."""
        return self._step is None and all(step.end.query() for step in self._waiting.copy())

    def collect(self) -> None:
        """Reads the steps whose events have all happened."""
        while self._waiting and self._waiting[0].end.query():
            self._read(self._waiting.popleft())

    def _read(self, step: _Step) -> None:
        """Few calls for each use: on a GPU each costs a microsecond."""
        marks: list[tuple[str, Any, Any, Any, Any]] = []
        stall = copy = 0.0
        h2d_bytes = 0
        for layer, begun, served, transfer in step.uses:
            if transfer is None:
                marks.append((layer.name, begun, served, None, None))
                continue
            waited = _seconds(begun, served)
            stall += waited
            layer.times.stall_s = waited
            layer.times.stall_total_s += waited
            if not transfer.uploads:
                h2d_bytes += transfer.nbytes
                copy += _seconds(transfer.started, transfer.ready)
            marks.append((layer.name, begun, served, transfer.started, transfer.ready))
        if step.measured is not None:
            self._measure(step)
        self.finished.append(
            StepTimes(step.root, _seconds(step.base, step.end), stall, copy, h2d_bytes, step.base, marks)
        )

    def _measure(self, step: _Step) -> None:
        measured: dict[Layer, Measured] = {}
        for use, following in itertools.zip_longest(step.uses, step.uses[1:]):
            compute_s = _seconds(use.served, step.end if following is None else following.begun)
            reads = step.reads.get(use.layer)
            read_s = min(compute_s, _seconds(use.served, reads.pop(0))) if reads else compute_s
            before = measured.get(use.layer, Measured(0.0, 0.0))
            measured[use.layer] = Measured(before.compute_s + compute_s, before.read_s + read_s)
        for layer, times in measured.items():
            layer.times.by_work[step.measured] = times


def _seconds(first: Any, then: Any) -> float:
    return max(0.0, first.elapsed_time(then) * 1e-3)

"""What the last steps did, from device events: seconds, stalls, and the trace that a profiler page can draw.

Events are recorded in a step and read when they have happened, and then only if somebody asks: nothing here
waits for the device, and what nobody looks at costs a step little.
"""

from __future__ import annotations

import contextlib
from array import array
from collections import deque
from collections.abc import Hashable
from typing import Any, NamedTuple

from lib_qswap.swap.device import Device
from lib_qswap.swap.layer import Layer, Measured
from lib_qswap.swap.transfer import Transfer

KEPT_STEPS = 8
NAN = float("nan")


class ResidentUse(NamedTuple):
    """One use of a layer that needs no transfer: the event on the compute stream at which it began."""

    layer: Layer
    begun: Any


class Span(NamedTuple):
    """One use of a layer, in seconds since the begin of its step: when it asked for its weights, when it had
    them, and when their copy began and ended; nan where there was none. A copy may have begun in the step
    before: a negative time."""

    name: str
    begun_s: float
    served_s: float
    copy_begun_s: float
    copy_ended_s: float


class StepTimes(NamedTuple):
    """One finished forward of a model.

    seconds: from its begin to its end on the compute stream; stall_s: how long it waited for weights;
        copy_s, h2d_bytes: how long the copy stream spent on the transfers used in it, and what they brought,
        without those that made layers resident; names, times: what `spans` is made from.
    """

    root: Hashable
    seconds: float
    stall_s: float
    copy_s: float
    h2d_bytes: int
    names: list[str]
    times: array[float]

    def spans(self) -> list[Span]:
        """The uses in it, in their order."""
        fours = zip(*[iter(self.times)] * 4, strict=True)
        return [Span(name, *four) for name, four in zip(self.names, fours, strict=True)]


class _Step:
    __slots__ = ("base", "end", "measured", "reads", "root", "times", "uses")

    def __init__(self, root: Hashable, base: Any, measured: Hashable) -> None:
        self.root, self.base, self.measured = root, base, measured
        self.end: Any = None
        self.times: StepTimes | None = None
        self.uses: list[Transfer | ResidentUse] = []
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
        self._ended: deque[_Step] = deque(maxlen=KEPT_STEPS)
        self.profiling = False

    @property
    def finished(self) -> list[StepTimes]:
        """The last steps that the device had done when `collect` was called, oldest first. Any thread may
        ask."""
        return self._read_all()

    def last(self) -> StepTimes | None:
        """The last step that the device had done when `collect` was called; to read one is cheaper than all
        of `finished`."""
        with contextlib.suppress(IndexError, RuntimeError):
            return self._read(self._ended[-1])
        return None

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

    def abandon(self, root: Hashable) -> None:
        """The forward of `root` has no end."""
        if self._step is not None and self._step.root == root:
            self._step, self.profiling = None, False

    def is_waiting_for(self, measured: Hashable) -> bool:
        """Whether the device has still to do a step in which the times of that work are taken."""
        return any(step.measured == measured for step in self._waiting)

    def forget(self) -> None:
        """The steps that the device has not done yet are dropped, and nothing is held on to."""
        self.collect()
        self._waiting.clear()
        self._read_all()
        self._step, self.profiling = None, False

    def mark(self, stream: Any) -> Any:
        """A point in time on `stream`."""
        event = self._device.new_event(timing=True)
        event.record(stream)
        return event

    def used(self, transfer: Transfer) -> None:
        """The layer of `transfer` has asked for its weights, and computes as soon as they are there."""
        if self._step is not None:
            self._step.uses.append(transfer)

    def used_at_once(self, layer: Layer) -> None:
        """`layer` has asked for its weights, which were there."""
        if self._step is not None:
            self._step.uses.append(ResidentUse(layer, self.mark(self._device.current_stream())))

    def read(self, layer: Layer) -> None:
        """What reads the weights of `layer` has been issued."""
        if self._step is not None and self.profiling:
            event = self.mark(self._device.current_stream())
            self._step.reads.setdefault(layer, []).append(event)

    @property
    def is_over(self) -> bool:
        """Whether the device has done all steps that have begun. Any thread may ask."""
        return self._step is None and all(step.end.query() for step in self._waiting.copy())

    def collect(self) -> None:
        """Looks which steps the device has done. What was measured in them is read."""
        measured = False
        while self._waiting and self._waiting[0].end.query():
            self._ended.append(self._waiting.popleft())
            measured = measured or self._ended[-1].measured is not None
        if measured:
            self._read_all()

    def _read_all(self) -> list[StepTimes]:
        found = []
        for step in self._ended.copy():
            # A layer that ran on another stream may not be done yet although its forward is.
            with contextlib.suppress(RuntimeError):
                found.append(self._read(step))
        return found

    def _read(self, step: _Step) -> StepTimes:
        """What `step` took. Several threads may read it at once: they find the same."""
        uses, reads = step.uses, step.reads
        if step.times is not None:
            return step.times
        since = step.base.elapsed_time
        times = array("d")
        stall = copy = 0.0
        h2d_bytes = 0
        for use in uses:
            if isinstance(use, ResidentUse):
                begun = since(use.begun) * 1e-3
                times.extend((begun, begun, NAN, NAN))
                continue
            layer = use.layer
            begun, copy_begun = since(use.events.awaited) * 1e-3, since(use.started) * 1e-3
            copy_ended = since(use.ready) * 1e-3
            served = max(begun, copy_ended)
            times.extend((begun, served, copy_begun, copy_ended))
            stall += served - begun
            layer.times.stall_s = served - begun
            if not use.uploads:
                h2d_bytes += layer.payload_bytes
                if use.leader is None:
                    copy += max(0.0, copy_ended - copy_begun)
        seconds = max(0.0, since(step.end) * 1e-3)
        if step.measured is not None:
            self._measure(step, uses, reads, times, seconds)
        names = [use.layer.name for use in uses]
        found = step.times = StepTimes(step.root, seconds, stall, copy, h2d_bytes, names, times)
        step.uses, step.reads = [], {}  # Nothing is held on to: layers can go, and events are used again.
        return found

    def _measure(
        self,
        step: _Step,
        uses: list[Transfer | ResidentUse],
        reads: dict[Layer, list[Any]],
        times: array[float],
        seconds: float,
    ) -> None:
        measured: dict[Layer, Measured] = {}
        coming = {layer: iter(events) for layer, events in reads.items()}
        begun = [*times[0::4], seconds]
        for i, (use, served) in enumerate(zip(uses, times[1::4], strict=True)):
            compute_s = max(0.0, begun[i + 1] - served)
            read_s, event = compute_s, next(coming.get(use.layer, iter(())), None)
            if event is not None:
                read_s = min(compute_s, max(0.0, step.base.elapsed_time(event) * 1e-3 - served))
            before = measured.get(use.layer, Measured(0.0, 0.0))
            measured[use.layer] = Measured(before.compute_s + compute_s, before.read_s + read_s)
        for layer, found in measured.items():
            # What disturbs a step, other programs or the host, makes layers longer, and never shorter.
            known = layer.times.by_work.get(step.measured)
            layer.times.by_work[step.measured] = found if known is None else min(known, found)

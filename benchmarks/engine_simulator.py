"""A discrete-event simulator of the swap engine: what its plans are judged by.

It shares no code with lib_qswap's step model, which replaces all of this by one recurrence. Here a host
thread, a copy engine, a compute engine and, for CPU and Disk, a reading thread are processes that wait for
each other.

What is assumed:

- Compute is one queue: layers run one after the other, each as long as the profile says, whatever the link
  does meanwhile. A swapped layer begins when its copy has arrived, and reads its weights first.
- Copies are one queue over one link of constant bandwidth, plus a latency for each copy. Each layer has one:
  small ones, of which the engine brings several with one copy, are taken to come one by one.
- The ring is bytes; a payload lies in one piece, and skips the ring's end where it does not fit there. A copy
  is issued as soon as the reading of everything that lay in its place, or in what was skipped, has been
  issued; on the device it waits for that reading's end.
- The host takes `host_issue_s` for each layer and never waits for the device: as a step's end is issued, the
  next step's first layers are fetched.
- CPU and Disk: one thread reads pieces of 8 MB at a constant rate into four staging buffers; each is copied
  from there, and read into again when that copy is done.
- Nothing else takes time: no launch, no unpacking besides what the profile holds, no memory traffic of copies
  that slows compute down.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lib_qswap.swap.planner import LayerCost

STAGING_BUFFER_BYTES = 16 << 20
STAGING_BUFFERS = 4


@dataclass(frozen=True)
class Machine:
    """Rates in bytes per second, times in seconds; `read_bytes_per_s` None: page-locked homes."""

    link_bytes_per_s: float
    copy_latency_s: float = 0.0
    host_issue_s: float = 0.0
    read_bytes_per_s: float | None = None


class Step(NamedTuple):
    """Seconds between the ends of two steps' compute, and how long of that compute waited for copies."""

    seconds: float
    stall_s: float


# ------------------------------------------------------------------------------------------ processes
@dataclass(eq=False)
class Event:
    happened: bool = False
    waiting: list[Process] = field(default_factory=list)


Process = Generator["float | Event", None, None]
"""Yields the seconds that it takes, or an event that it waits for."""


class Simulation:
    def __init__(self) -> None:
        self.now = 0.0
        self._serial = itertools.count()
        self._due: list[tuple[float, int, Process]] = []

    def start(self, process: Process) -> None:
        heapq.heappush(self._due, (self.now, next(self._serial), process))

    def fire(self, event: Event) -> None:
        event.happened = True
        for process in event.waiting:
            self.start(process)
        event.waiting.clear()

    def run(self) -> None:
        """Until nothing is left that could happen."""
        while self._due:
            self.now, _, process = heapq.heappop(self._due)
            for wanted in process:
                if not isinstance(wanted, Event):
                    heapq.heappush(self._due, (self.now + wanted, next(self._serial), process))
                    break
                if not wanted.happened:
                    wanted.waiting.append(process)
                    break


class Queue:
    """A stream of the device: its work runs in the order in which it was issued, one piece at a time."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._work: deque[tuple[list[Event], float, Event]] = deque()
        self._more = Event()
        self.waited_s = 0.0  # for events, with the work before done
        simulation.start(self._run())

    def issue(self, waits: list[Event], seconds: float) -> Event:
        done = Event()
        self._work.append((waits, seconds, done))
        self._simulation.fire(self._more)
        return done

    def _run(self) -> Process:
        while True:
            while not self._work:
                self._more = Event()
                yield self._more
            waits, seconds, done = self._work.popleft()
            begun = self._simulation.now
            yield from waits
            self.waited_s += self._simulation.now - begun
            yield seconds
            self._simulation.fire(done)


# ----------------------------------------------------------------------------------------- the engine
@dataclass(eq=False)
class Slot:
    start: int
    end: int
    read: Event | None = None
    """Happens when its layer has read it; None until that is issued."""


class Ring:
    """What lies where, oldest first."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._head = 0
        self._slots: deque[Slot] = deque()

    def take(self, nbytes: int) -> tuple[Slot, list[Event]] | None:
        """A place, and what has to be done before it may be written; None while some of it is not issued."""
        start = self._head if self._head + nbytes <= self.nbytes else 0
        spans = [(start, start + nbytes)]
        if start != self._head:
            spans.append((self._head, self.nbytes))
        in_the_way = 0  # first in, first out: with a slot, all that are older make way
        for count, slot in enumerate(self._slots, 1):
            if any(slot.start < end and begin < slot.end for begin, end in spans):
                in_the_way = count
        waits = []
        for slot in itertools.islice(self._slots, in_the_way):
            if slot.read is None:
                return None
            waits.append(slot.read)
        for _ in range(in_the_way):
            self._slots.popleft()
        taken = Slot(start, start + nbytes)
        self._slots.append(taken)
        self._head = taken.end
        return taken, waits


class Engine:
    """Runs `steps` steps of one model; `marks` has the time and the stalls so far at each step's end."""

    def __init__(
        self, layers: Sequence[LayerCost], resident: Collection[str], ring_bytes: int, machine: Machine
    ) -> None:
        self.machine = machine
        self.layers = layers
        kept = frozenset(resident)
        self.swapped = [layer.nbytes > 0 and layer.name not in kept for layer in layers]
        self.order = [layer.nbytes for layer, fetched in zip(layers, self.swapped, strict=True) if fetched]
        if max(self.order, default=0) > ring_bytes:
            raise ValueError(f"a layer does not fit into a ring of {ring_bytes} bytes")
        self.simulation = Simulation()
        self.compute, self.copies = Queue(self.simulation), Queue(self.simulation)
        self.ring = Ring(ring_bytes)
        self.ahead: deque[tuple[Slot, Event]] = deque()
        self.fetched = 0
        self.to_read: deque[tuple[int, list[Event], Event]] = deque()
        self.more_to_read = Event()
        self.marks: list[tuple[float, float]] = []

    def run(self, steps: int) -> None:
        if self.machine.read_bytes_per_s is not None:
            self.simulation.start(self._read(self.machine.read_bytes_per_s))
        self.simulation.start(self._host(steps))
        self.simulation.run()

    def _host(self, steps: int) -> Process:
        for _ in range(steps):
            for layer, fetched in zip(self.layers, self.swapped, strict=True):
                if self.machine.host_issue_s:
                    yield self.machine.host_issue_s
                if not fetched:
                    done = self.compute.issue([], layer.compute_s)
                    continue
                self._prefetch()
                slot, arrived = self.ahead.popleft()
                self._prefetch()
                read_s = layer.compute_s if layer.read_s is None else layer.read_s
                slot.read = self.compute.issue([arrived], read_s)
                done = self.compute.issue([], layer.compute_s - read_s)
                self._prefetch()
            self.simulation.start(self._mark(done))

    def _mark(self, done: Event) -> Process:
        yield done
        self.marks.append((self.simulation.now, self.compute.waited_s))

    def _prefetch(self) -> None:
        while len(self.ahead) < len(self.order):
            nbytes = self.order[self.fetched % len(self.order)]
            place = self.ring.take(nbytes)
            if place is None:
                return
            slot, waits = place
            self.fetched += 1
            if self.machine.read_bytes_per_s is None:
                arrived = self.copies.issue(waits, self._copy_s(nbytes))
            else:
                arrived = Event()
                self.to_read.append((nbytes, waits, arrived))
                self.simulation.fire(self.more_to_read)
            self.ahead.append((slot, arrived))

    def _copy_s(self, nbytes: int) -> float:
        return self.machine.copy_latency_s + nbytes / self.machine.link_bytes_per_s

    def _read(self, bytes_per_s: float) -> Process:
        copied: deque[Event] = deque([Event(happened=True)] * STAGING_BUFFERS)
        while True:
            while not self.to_read:
                self.more_to_read = Event()
                yield self.more_to_read
            nbytes, waits, arrived = self.to_read.popleft()
            for begin in range(0, nbytes, STAGING_BUFFER_BYTES):
                piece = min(STAGING_BUFFER_BYTES, nbytes - begin)
                yield copied.popleft()
                yield piece / bytes_per_s
                copied.append(self.copies.issue(waits, self._copy_s(piece)))
                waits = []
            self.simulation.start(self._pass_on(copied[-1], arrived))

    def _pass_on(self, event: Event, to: Event) -> Process:
        yield event
        self.simulation.fire(to)


def simulate(
    layers: Sequence[LayerCost],
    resident: Collection[str],
    *,
    ring_bytes: int,
    machine: Machine,
    steps: int,
) -> list[Step]:
    """The steps of a run whose ring is empty at first; `layers` in execution order.

    Raises ValueError where a swapped layer is larger than the ring.
    """
    engine = Engine(layers, resident, ring_bytes, machine)
    engine.run(steps)
    marks = [(0.0, 0.0), *engine.marks]
    return [
        Step(then - before, stalls_then - stalls_before)
        for (before, stalls_before), (then, stalls_then) in itertools.pairwise(marks)
    ]

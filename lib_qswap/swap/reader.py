"""Reading masters into staging: on one thread, or on as many as were measured to be faster.

One thread copies RAM at about 10 GB/s, which a PCIe 4 link outruns. More threads bring more only where the
memory, or the disk, has it to give, and where cores are idle; so twice as many are tried, and kept if that
pays.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch

TRIAL_BYTES = 512 << 20
"""Read each way before they are compared."""

AGAIN_BYTES, MOST_AGAIN_BYTES = 4 << 30, 32 << 30
"""Read before more threads are tried once more, and twice as much after each time up to the second: a file
may have been on its way into the cache, or the machine busy with something else."""

WORTH = 1.25
"""How many times faster twice as many threads have to be to be kept."""

BUSY = 0.7
"""More threads are tried only where reading takes this share of the time: else it is the link, or the
computation, that takes long."""

NUMBERS_OF_THREADS = (1, 2, 4)
CORES_PER_THREAD = 2
LEAST_BYTES = 256 << 10
"""For one thread: handing less to another takes as long as reading it."""


class Source(Protocol):
    """What is read from: a `Home`."""

    def read_into(self, destination: torch.Tensor, start_byte: int) -> None: ...


class Reader:
    """Fills staging buffers, several at once where that is faster; called by one thread.

    Attributes:
        threads: that read now; one: the caller's.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, *, threads: int | None = None) -> None:
        """threads: how many it always has; None: as many as are found to be fastest."""
        self.threads = threads or 1
        self._clock = clock
        self._others: list[OtherThread] = []
        self._begun_by_others = 0
        self._most = 1 if threads else max(numbers_of_threads())
        self._measuring = self._most > 1
        self._since_trial, self._again_bytes = 0, AGAIN_BYTES
        self._rate_of_fewer: float | None = None
        self._restart()

    def _restart(self) -> None:
        self._begun, self._reading_s, self._nbytes = self._clock(), 0.0, 0

    def begin(self, source: Source, destination: torch.Tensor, start_byte: int) -> Reading:
        """Bytes of `source` from `start_byte` on are to be read into `destination` (uint8, flat, in host
        memory). What was begun first has to be finished first."""
        other = None
        if self.threads > 1 and destination.numel() >= LEAST_BYTES:
            while len(self._others) < self.threads:
                self._others.append(OtherThread())
            other = self._others[self._begun_by_others % self.threads]
            self._begun_by_others += 1
            other.begin(source, destination, start_byte)
        return Reading(source, destination, start_byte, other)

    def finish(self, reading: Reading | Failed) -> BaseException | None:
        """Waits until it is read. Returns what went wrong, if anything: OSError or GGUFError where the file
        can no longer be read."""
        begun = self._clock()
        error = reading.finish()
        nbytes = reading.nbytes
        if self._measuring:
            self._reading_s += self._clock() - begun
            self._nbytes += nbytes
            if self._nbytes >= TRIAL_BYTES:
                self._judge()
        elif self._most > 1:
            self._since_trial += nbytes
            if self._since_trial >= self._again_bytes:
                self._measuring, self._since_trial = True, 0
                self._again_bytes = min(2 * self._again_bytes, MOST_AGAIN_BYTES)
                self._restart()
        return error

    def _judge(self) -> None:
        # Time in which nobody had to wait for others is no time that reading took.
        rate = self._nbytes / max(self._reading_s, 1e-9)
        fewer, self._rate_of_fewer = self._rate_of_fewer, None
        if fewer is not None and rate < WORTH * fewer:
            self._use(self.threads // 2)
            self._measuring = False
        elif 2 * self.threads > self._most:
            self._measuring = False
        elif self._reading_s >= BUSY * (self._clock() - self._begun):
            self._rate_of_fewer = rate
            self._use(self.threads * 2)
        self._restart()

    def _use(self, threads: int) -> None:
        self.threads = threads
        wanted = threads if threads > 1 else 0
        for other in self._others[wanted:]:
            other.end()
        del self._others[wanted:]

    def close(self) -> None:
        """Ends the other threads, if any."""
        self._use(1)
        self._measuring, self._since_trial, self._rate_of_fewer = self._most > 1, 0, None
        self._again_bytes = AGAIN_BYTES
        self._restart()


class Reading:
    """What a reader was asked for, on its way."""

    __slots__ = ("_other", "_source", "_start_byte", "destination", "nbytes")

    def __init__(
        self, source: Source, destination: torch.Tensor, start_byte: int, other: OtherThread | None
    ) -> None:
        self.destination, self.nbytes = destination, destination.numel()
        self._source, self._start_byte, self._other = source, start_byte, other

    @property
    def needs_no_waiting(self) -> bool:
        """Whether it has been read, or is when it is finished."""
        return self._other is None or self._other.has_finished

    def finish(self) -> BaseException | None:
        """Waits for it, or reads; once. Returns what went wrong, if anything."""
        if self._other is not None:
            return self._other.finish()
        try:
            self._source.read_into(self.destination, self._start_byte)
        except BaseException as error:
            return error
        return None


class Failed:
    """What could not even be asked for."""

    needs_no_waiting = True
    nbytes = 0

    def __init__(self, error: Exception) -> None:
        self._error = error

    def finish(self) -> BaseException:
        """Returns what went wrong."""
        return self._error


class OtherThread:
    """Carries out one read after the other beside its caller's."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[Source, torch.Tensor, int] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_read_all, args=(self._asked, self._answers), name="qswap-reader", daemon=True
        )
        self._thread.start()

    def begin(self, source: Source, destination: torch.Tensor, start_byte: int) -> None:
        self._asked.put((source, destination, start_byte))

    @property
    def has_finished(self) -> bool:
        """Whether `finish` would return at once."""
        return not self._answers.empty()

    def finish(self) -> BaseException | None:
        """Waits for what was begun first; returns what went wrong, if anything."""
        return self._answers.get()

    def end(self) -> None:
        self._asked.put(None)
        self._thread.join()


def _read_all(
    asked: queue.SimpleQueue[tuple[Source, torch.Tensor, int] | None],
    answers: queue.SimpleQueue[BaseException | None],
) -> None:
    """The thread's loop, until it gets None."""
    while (item := asked.get()) is not None:
        source, destination, start_byte = item
        try:
            source.read_into(destination, start_byte)
            error: BaseException | None = None
        except BaseException as raised:
            error = raised
        # Nothing of a model is held on to while there is nothing to read.
        del item, source, destination
        answers.put(error)
        del error  # Its traceback would.


def numbers_of_threads() -> tuple[int, ...]:
    """Of `NUMBERS_OF_THREADS` those that there are cores for, and 1."""
    cores = available_cores()
    return tuple(n for n in NUMBERS_OF_THREADS if n == 1 or n * CORES_PER_THREAD <= cores)


def available_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

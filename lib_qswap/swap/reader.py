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

TRIAL_BYTES = 256 << 20
"""Read each way before they are compared."""

AGAIN_BYTES = 32 << 30
"""Read before more threads are tried once more: a file may have been on its way into the cache."""

WORTH = 1.25
"""How many times faster twice as many threads have to be to be kept."""

BUSY = 0.8
"""More threads are tried only where reading takes this share of the time: else it is the link, or the
computation, that takes long."""

NUMBERS_OF_THREADS = (1, 2, 4)
CORES_PER_THREAD = 2
LEAST_BYTES = 256 << 10
"""For one thread: handing less to another takes as long as reading it."""
PAGE_BYTES = 4096


class Source(Protocol):
    """What is read from: a `Home`."""

    def read_into(self, destination: torch.Tensor, start_byte: int) -> None: ...


class Reader:
    """Fills staging buffers; called by one thread.

    Attributes:
        threads: that read now, the caller's among them.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, *, threads: int | None = None) -> None:
        """threads: how many it always has; None: as many as are found to be fastest."""
        self.threads = threads or 1
        self._clock = clock
        self._others: list[OtherThread] = []
        self._most = 1 if threads else max(numbers_of_threads())
        self._measuring = self._most > 1
        self._since_trial = 0
        self._rate_of_fewer: float | None = None
        self._restart()

    def _restart(self) -> None:
        self._begun, self._reading_s, self._nbytes = self._clock(), 0.0, 0

    def read(self, source: Source, destination: torch.Tensor, start_byte: int) -> None:
        """Bytes of `source` from `start_byte` on into `destination` (uint8, flat, in host memory).

        Raises:
            OSError, GGUFError: the file can no longer be read.
        """
        begun = self._clock()
        nbytes = destination.numel()
        if not nbytes:
            return
        threads = max(1, min(self.threads, nbytes // LEAST_BYTES))
        each = -(-nbytes // threads // PAGE_BYTES) * PAGE_BYTES
        pieces = [(start, destination[start : start + each]) for start in range(0, nbytes, each)]
        while len(self._others) < len(pieces) - 1:
            self._others.append(OtherThread())
        others = self._others[: len(pieces) - 1]
        for other, (start, piece) in zip(others, pieces[1:], strict=True):
            other.begin(source, piece, start_byte + start)
        try:
            source.read_into(pieces[0][1], start_byte)
        finally:
            errors = [other.finish() for other in others]
        for error in errors:
            if error is not None:
                raise error
        if self._measuring:
            self._reading_s += self._clock() - begun
            self._nbytes += nbytes
            if self._nbytes >= TRIAL_BYTES:
                self._judge()
        elif self._most > 1:
            self._since_trial += nbytes
            if self._since_trial >= AGAIN_BYTES:
                self._measuring, self._since_trial = True, 0
                self._restart()

    def _judge(self) -> None:
        rate = self._nbytes / self._reading_s
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
        for other in self._others[threads - 1 :]:
            other.end()
        del self._others[threads - 1 :]

    def close(self) -> None:
        """Ends the other threads, if any."""
        self._use(1)
        self._measuring, self._since_trial, self._rate_of_fewer = self._most > 1, 0, None
        self._restart()


class OtherThread:
    """Carries out one read at a time beside its caller's."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[Source, torch.Tensor, int] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_read_all, args=(self._asked, self._answers), name="qswap-reader", daemon=True
        )
        self._thread.start()

    def begin(self, source: Source, destination: torch.Tensor, start_byte: int) -> None:
        self._asked.put((source, destination, start_byte))

    def finish(self) -> BaseException | None:
        """Waits for what was begun; returns what went wrong, if anything."""
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

"""Reading masters into staging: on one thread, or on two where that was measured to be faster.

One thread copies RAM at about 10 GB/s, which a PCIe 4 link outruns. A second one brings more only where the
memory, or the disk, has it to give, and where a core is idle; so it is tried, and kept if it pays.
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

WORTH = 1.25
"""How many times faster two threads have to be to be kept."""

BUSY = 0.8
"""A second thread is tried only where the first one reads for this share of the time: else it is the link, or
the computation, that takes long."""

SPARE_CORES_FROM = 4
PAGE_BYTES = 4096


class Source(Protocol):
    """What is read from: a `Home`."""

    def read_into(self, destination: torch.Tensor, start_byte: int) -> None: ...


class Reader:
    """Fills staging buffers; called by one thread.

    Attributes:
        threads: that read now, 1 or 2.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.threads = 1
        self._clock = clock
        self._second: SecondThread | None = None
        self._tried = available_cores() < SPARE_CORES_FROM
        self._rate_of_one: float | None = None
        self._restart()

    def _restart(self) -> None:
        self._begun, self._reading_s, self._nbytes = self._clock(), 0.0, 0

    def read(self, source: Source, destination: torch.Tensor, start_byte: int) -> None:
        """Bytes of `source` from `start_byte` on into `destination` (uint8, flat, in host memory).

        Raises:
            OSError, GGUFError: the file can no longer be read.
        """
        if self._tried and self.threads == 1:
            source.read_into(destination, start_byte)
            return
        begun = self._clock()
        half = destination.numel() // 2 // PAGE_BYTES * PAGE_BYTES
        if self.threads == 1 or not half:
            source.read_into(destination, start_byte)
        else:
            if self._second is None:
                self._second = SecondThread()
            self._second.begin(source, destination[half:], start_byte + half)
            try:
                source.read_into(destination[:half], start_byte)
            finally:
                error = self._second.finish()
            if error is not None:
                raise error
        if not self._tried:
            self._reading_s += self._clock() - begun
            self._nbytes += destination.numel()
            if self._nbytes >= TRIAL_BYTES:
                self._judge()

    def _judge(self) -> None:
        rate = self._nbytes / self._reading_s
        if self.threads == 2:
            assert self._rate_of_one is not None
            self._tried = True
            if rate < WORTH * self._rate_of_one:
                self.close()
        elif self._reading_s >= BUSY * (self._clock() - self._begun):
            self._rate_of_one, self.threads = rate, 2
        self._restart()

    def close(self) -> None:
        """Ends the second thread, if any."""
        self.threads = 1
        if self._second is not None:
            self._second.end()
            self._second = None


class SecondThread:
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


def available_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""How a payload gets from its home to the device.

From page-locked memory one asynchronous copy does it. From pageable memory or a file such a copy would hold
the calling thread for its whole length, so a worker thread reads piece by piece into a few page-locked
staging buffers and copies from those: then these homes overlap with compute as well. As soon as one layer
needs the worker, all transfers go through it, so that writes into the ring keep the order in which they were
asked for.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

import torch

from lib_qswap.swap import ledger
from lib_qswap.swap.arena import HostBuffer, PinnedBlock
from lib_qswap.swap.device import Device
from lib_qswap.swap.home import PinBudget
from lib_qswap.swap.reader import Reader

if TYPE_CHECKING:
    from lib_qswap.swap.layer import Layer
    from lib_qswap.swap.ring import Slot

# Where several threads read, half as many buffers of twice the size: handing out a piece to them and waiting
# for the last takes a good part of the time in which they read it.
STAGING_BUFFER_BYTES = 8 << 20
STAGING_BUFFERS = 4


def staging_buffer_bytes(threads: int) -> int:
    """Of each, where so many threads read."""
    return STAGING_BUFFER_BYTES * (2 if threads > 1 else 1)


ISSUED = threading.Event()
ISSUED.set()


class Transfer:
    """One payload on its way to `target` (uint8, flat, on the device).

    Attributes:
        waits: events after which `target` may be written.
        started, ready: events on the copy stream around the copy; recorded once `recorded` and `issued`
            are set.
        issued: set once the copy has been handed to the device; the event of each transfer that another
            thread hands over, one for all that need none of their own.
        awaited: the event on the compute stream at which its layer asked for it; None before.
        uploads: whether it makes its layer resident.
        error: why the bytes are not there, if so.
    """

    __slots__ = (
        "awaited",
        "cancelled",
        "error",
        "issued",
        "layer",
        "nbytes",
        "ready",
        "recorded",
        "slot",
        "started",
        "target",
        "uploads",
        "waits",
    )

    def __init__(
        self,
        layer: Layer,
        target: torch.Tensor,
        slot: Slot | None,
        waits: list[Any],
        *,
        uploads: bool = False,
    ) -> None:
        self.layer, self.target, self.slot, self.waits, self.uploads = layer, target, slot, waits, uploads
        self.nbytes = target.numel()
        self.started: Any = None
        self.ready: Any = None
        self.awaited: Any = None
        self.issued = ISSUED
        self.recorded = False
        self.cancelled = False
        self.error: BaseException | None = None

    @property
    def submitted(self) -> bool:
        """Whether the copier has it."""
        return self.started is not None

    @property
    def begun(self) -> bool:
        """Whether bytes are on their way: the device has come to the copy."""
        return self.recorded and self.started.query()

    @property
    def arrived(self) -> bool:
        """Whether all bytes are there."""
        return self.submitted and self.issued.is_set() and self.error is None and bool(self.ready.query())


class Copier:
    """Carries out transfers on one device, in the order in which they are submitted.

    Attributes:
        reader: of the worker thread.
    """

    def __init__(self, device: Device, pin_budget: PinBudget) -> None:
        self._device = device
        self._pin_budget = pin_budget
        self.stream = device.new_stream()
        self.h2d_bytes = 0
        self.staging_locked_bytes = 0
        self.reader = Reader()
        self._staging_memory: torch.Tensor | None = None
        self._staging: list[tuple[torch.Tensor, Any]] = []
        self._next_staging = 0
        self._queue: queue.SimpleQueue[Transfer | threading.Event | None] | None = None
        self._thread: threading.Thread | None = None

    @property
    def staged(self) -> bool:
        """Whether transfers go through the worker thread."""
        return self._thread is not None

    def use_worker(self, wanted: bool) -> None:
        """Starts or ends the worker thread and its staging buffers. Only between steps.

        The buffers are page-locked within the pin budget, before anything else is; without a budget for them
        the worker copies from pageable buffers: slower, and still off the calling thread.
        """
        if wanted == self.staged or (wanted and not self._device.streams and not self._device.is_host):
            return
        if wanted:
            if not self._device.is_host:
                self._allocate_staging()
            self._queue = queue.SimpleQueue()
            self._thread = threading.Thread(
                target=_work, args=(self._queue, self._issue), name="qswap-copier", daemon=True
            )
            self._thread.start()
        else:
            assert self._queue is not None
            assert self._thread is not None
            self._queue.put(None)
            self._thread.join()
            self._thread, self._queue = None, None
            self.reader.close()
            self._split_staging(None)
            self._staging_memory = None
            self.staging_locked_bytes = 0

    def _allocate_staging(self) -> None:
        nbytes = STAGING_BUFFERS * STAGING_BUFFER_BYTES
        with torch.inference_mode(False):
            memory = None
            if self._device.can_page_lock:
                try:
                    if self._device.can_register:
                        buffer = HostBuffer.of(nbytes)
                        memory = torch.frombuffer(buffer, dtype=torch.uint8)
                        reason = buffer.lock(self._device, self._pin_budget, memory)
                        if reason:
                            _report_pageable(reason)
                    else:
                        memory = PinnedBlock(self._device, self._pin_budget, nbytes).tensor
                except (RuntimeError, MemoryError) as error:
                    _report_pageable(str(error))
            if memory is None:
                memory = torch.empty(nbytes, dtype=torch.uint8)
            self.staging_locked_bytes = nbytes if memory.is_pinned() else 0
            self._staging_memory = memory
            self._split_staging(STAGING_BUFFER_BYTES)

    def _split_staging(self, buffer_bytes: int | None) -> None:
        """Makes buffers of this size of the staging memory, once the device has read it; None: none."""
        for _, free in self._staging:
            free.synchronize()
        self._staging, self._next_staging = [], 0
        if buffer_bytes is not None:
            assert self._staging_memory is not None
            for piece in self._staging_memory.split(buffer_bytes):
                free = self._device.new_event()
                self._device.record(free, self.stream)
                self._staging.append((piece, free))

    def submit(self, transfer: Transfer) -> None:
        """Begins `transfer`; at the latest when `transfer.issued` is set, `transfer.ready` can be waited
        for."""
        transfer.started = self._device.new_event(timing=True)
        transfer.ready = self._device.new_event(timing=True)
        self.h2d_bytes += transfer.nbytes
        if self._queue is not None:
            transfer.issued = threading.Event()
            self._queue.put(transfer)
        else:
            self._issue(transfer)

    def drain(self) -> None:
        """Returns when every transfer submitted so far has been issued."""
        if self._queue is not None:
            reached = threading.Event()
            self._queue.put(reached)
            reached.wait()

    def finish(self) -> None:
        """Returns when the device has read everything: before the host memory of masters is released."""
        self.drain()
        if self.stream is not None:
            self.stream.synchronize()

    @property
    def is_worker(self) -> bool:
        """Whether the calling thread is the worker."""
        return threading.current_thread() is self._thread

    def _issue(self, transfer: Transfer) -> None:
        try:
            with self._device.on_stream(self.stream):
                for event in transfer.waits:
                    self._device.wait(event, self.stream)
                self._device.record(transfer.started, self.stream)
                transfer.recorded = True  # An event that was never recorded counts as happened.
                if not transfer.cancelled:
                    self._copy(transfer)
                self._device.record(transfer.ready, self.stream)
        except BaseException as error:
            transfer.error = error
        finally:
            if transfer.issued is not ISSUED:
                transfer.issued.set()

    def _copy(self, transfer: Transfer) -> None:
        home, target = transfer.layer.home, transfer.target
        if self._device.is_host:
            home.read_into(target, 0)
        elif home.page_locked:
            assert home.payload is not None
            target.copy_(home.payload, non_blocking=True)
        elif self._staging:
            buffer_bytes = staging_buffer_bytes(self.reader.threads)
            if buffer_bytes != self._staging[0][0].numel():
                self._split_staging(buffer_bytes)
            for start in range(0, target.numel(), buffer_bytes):
                piece = target[start : start + buffer_bytes]
                buffer, free = self._staging[self._next_staging]
                self._next_staging = (self._next_staging + 1) % len(self._staging)
                free.synchronize()
                self.reader.read(home, buffer[: piece.numel()], start)
                piece.copy_(buffer[: piece.numel()], non_blocking=True)
                self._device.record(free, self.stream)
        elif home.payload is not None:
            target.copy_(home.payload)
        else:
            memory = torch.empty(target.numel(), dtype=torch.uint8)
            home.read_into(memory, 0)
            target.copy_(memory)


def _work(items: queue.SimpleQueue[Transfer | threading.Event | None], issue: Any) -> None:
    """The worker's loop, until it gets None."""
    while (item := items.get()) is not None:
        if isinstance(item, threading.Event):
            item.set()
        else:
            issue(item)


def _report_pageable(reason: str) -> None:
    ledger.message(
        f"Staging buffers are ordinary RAM, which makes CPU and Disk slower: {reason}. "
        "Lower the page-lock budget.",
        "warning",
    )

"""How a payload gets from its home to the device.

From page-locked memory one asynchronous copy does it. From pageable memory or a file such a copy would hold
the calling thread for its whole length, so a worker thread reads piece by piece into a few page-locked
staging buffers and copies from those: then these homes overlap with compute as well. As soon as one layer
needs the worker, all transfers go through it, so that writes into the ring keep the order in which they were
asked for.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
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


class Events:
    """What a transfer is ordered and timed by. Making them takes the host longer than all else that a
    transfer does: the next one has them when nobody holds on to this one any more.

    Attributes:
        started, ready: on the copy stream, around the copy.
        awaited: on the compute stream, where its layer asked for it.
        done: on the compute stream, behind what reads the target.
        issued: set once the copy has been handed to the device, where another thread does that.
    """

    __slots__ = ("awaited", "done", "issued", "ready", "started")

    def __init__(self, device: Device) -> None:
        self.started = device.new_event(timing=True)
        self.ready = device.new_event(timing=True)
        self.awaited = device.new_event(timing=True)
        self.done = device.new_event()
        self.issued: threading.Event | None = None


class Transfer:
    """One payload on its way to `target` (uint8, flat, on the device).

    Attributes:
        parts: the layer's tensors in `target`.
        after: the transfers whose target lay there before: this one is written when they are done.
        events: None until the copier has it. Who holds an event has to hold the transfer.
        recorded, issued, awaited: whether `started`, `ready` and `awaited` of them have been recorded. (One
            that never was counts as happened.)
        uploads: whether it makes its layer resident.
        error: why the bytes are not there, if so.
    """

    __slots__ = (
        "_spare",
        "after",
        "awaited",
        "cancelled",
        "error",
        "events",
        "issued",
        "layer",
        "parts",
        "recorded",
        "slot",
        "target",
        "uploads",
    )

    def __init__(
        self,
        layer: Layer,
        target: torch.Tensor,
        parts: dict[str, torch.Tensor],
        slot: Slot | None = None,
        after: Sequence[Transfer] = (),
        *,
        uploads: bool = False,
    ) -> None:
        self.events: Any = None
        self.layer, self.target, self.parts, self.slot = layer, target, parts, slot
        self.after, self.uploads = after, uploads
        self.recorded = self.issued = self.awaited = self.cancelled = False
        self.error: BaseException | None = None

    def take_events(self, spare: list[Events], device: Device) -> None:
        """The copier has it. Its events are of `spare`, where there are any, and go back there."""
        self._spare = spare
        try:
            self.events = spare.pop()
        except IndexError:
            self.events = Events(device)

    def __del__(self) -> None:
        # Reference counts say when nobody can ask for these events any more, in whatever thread.
        if self.events is not None:
            self._spare.append(self.events)

    @property
    def submitted(self) -> bool:
        """Whether the copier has it."""
        return self.events is not None

    @property
    def begun(self) -> bool:
        """Whether bytes are on their way: the device has come to the copy."""
        return self.recorded and bool(self.events.started.query())

    @property
    def arrived(self) -> bool:
        """Whether all bytes are there."""
        return self.issued and self.error is None and bool(self.events.ready.query())


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
        self._spare_events: list[Events] = []
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
                target=_work,
                args=(self._queue, self._device.on_stream(self.stream), self._issue),
                name="qswap-copier",
                daemon=True,
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
                free.record(self.stream)
                self._staging.append((piece, free))

    def submit(self, transfer: Transfer) -> None:
        """Begins `transfer`; `transfer.events.ready` can be waited for when it is `issued`."""
        transfer.take_events(self._spare_events, self._device)
        self.h2d_bytes += transfer.layer.payload_bytes
        if self._queue is not None:
            if transfer.events.issued is None:
                transfer.events.issued = threading.Event()
            else:
                transfer.events.issued.clear()
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
        events, stream = transfer.events, self.stream
        try:
            for earlier in transfer.after:
                earlier.events.done.wait(stream)
            events.started.record(stream)
            transfer.recorded = True
            if not transfer.cancelled:
                if self.staged:  # On the worker, whose stream it is.
                    self._copy(transfer)
                else:
                    self._device.issue_on(stream, self._copy, transfer)
            events.ready.record(stream)
        except BaseException as error:
            transfer.error = error
        finally:
            transfer.after = ()  # Their events are free for others now.
            transfer.issued = True
            if events.issued is not None:
                events.issued.set()

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
                free.record(self.stream)
        elif home.payload is not None:
            target.copy_(home.payload)
        else:
            memory = torch.empty(target.numel(), dtype=torch.uint8)
            home.read_into(memory, 0)
            target.copy_(memory)


def _work(
    items: queue.SimpleQueue[Transfer | threading.Event | None],
    on_stream: contextlib.AbstractContextManager[Any],
    issue: Callable[[Transfer], None],
) -> None:
    """The worker's loop, until it gets None."""
    with on_stream:
        while (item := items.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            else:
                issue(item)
            del item  # A transfer that nobody else holds on to leaves its events to the next one.


def _report_pageable(reason: str) -> None:
    ledger.message(
        f"Staging buffers are ordinary RAM, which makes CPU and Disk slower: {reason}. "
        "Lower the page-lock budget.",
        "warning",
    )

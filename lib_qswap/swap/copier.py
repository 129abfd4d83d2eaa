"""How a payload gets from its home to the device.

From page-locked memory one asynchronous copy does it. From pageable memory or a file such a copy would hold
the calling thread for its whole length, so a worker thread reads piece by piece into a few page-locked
staging buffers and copies from those: then these homes overlap with compute as well. As soon as one layer
needs the worker, all transfers go through it, so that writes into the ring keep the order in which they were
asked for.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch

from lib_qswap.swap import ledger
from lib_qswap.swap.arena import HostBuffer, PinnedBlock
from lib_qswap.swap.device import Device
from lib_qswap.swap.home import PinBudget
from lib_qswap.swap.reader import Failed, Reader, Reading, numbers_of_threads
from lib_qswap.swap.transfer import Events, Transfer

STAGING_BUFFER_BYTES = 16 << 20
"""For each piece the interpreter lock changes hands some four times, which costs the thread that computes
50 us each: half as large pieces cost it twice as much."""

LEAST_STAGING_BUFFER_BYTES = 2 << 20
"""Where the page-lock budget has no room for larger ones."""

STAGING_BUFFERS = 4
BEING_COPIED = 2
"""Buffers that the device reads while the others are filled."""


def staging_buffers() -> int:
    """How many there are: twice as many where several threads may read."""
    return STAGING_BUFFERS * min(2, max(numbers_of_threads()))


class Piece:
    """A part of a transfer on its way through a staging buffer.

    Attributes:
        free: the event after which the buffer may be filled again.
    """

    __slots__ = ("free", "is_first", "is_last", "reading", "target", "transfer")

    def __init__(
        self,
        transfer: Transfer,
        target: torch.Tensor,
        reading: Reading | Failed,
        free: Any,
        place: tuple[bool, bool],
    ) -> None:
        self.transfer, self.target, self.reading, self.free = transfer, target, reading, free
        self.is_first, self.is_last = place


Item: TypeAlias = "Transfer | Piece | threading.Event"
"""What the worker comes to, in the order in which it was asked for; an event says that it has."""


_with_worker: weakref.WeakSet[Copier] = weakref.WeakSet()
_END_S = 5.0


@atexit.register
def _end_workers() -> None:
    """A thread that comes back from torch while the interpreter ends would end the process with an error."""
    for copier in list(_with_worker):
        copier._end_worker(_END_S)
        copier.reader.close()


class Copier:
    """Carries out transfers on one device, in the order in which they are submitted.

    Attributes:
        reader: of the worker thread.
        direct: how page-locked memory is copied without torch, if it can be.
    """

    def __init__(self, device: Device, pin_budget: PinBudget) -> None:
        self._device = device
        self._pin_budget = pin_budget
        self.stream = device.new_stream()
        self.direct = device.direct_copy(self.stream)
        self.h2d_bytes = 0
        self.staging_locked_bytes = 0
        self.reader = Reader()
        self._staging_memory: torch.Tensor | None = None
        self._staging_block: PinnedBlock | None = None
        self._spare_events: list[Events] = []
        self._staging: list[tuple[torch.Tensor, Any]] = []
        self._next_staging = 0
        self._piece_bytes = STAGING_BUFFER_BYTES
        self._under_way: deque[Item] = deque()
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
                target=self._work,
                args=(self._queue,),
                name="qswap-copier",
                daemon=True,
            )
            self._thread.start()
            _with_worker.add(self)
        else:
            self._end_worker(None)
            self.reader.close()
            for _, free in self._staging:
                free.synchronize()
            self._staging, self._staging_memory, self._staging_block = [], None, None
            self.staging_locked_bytes = 0

    def _end_worker(self, timeout_s: float | None) -> None:
        assert self._queue is not None
        assert self._thread is not None
        self._queue.put(None)
        self._thread.join(timeout_s)
        self._thread, self._queue = None, None
        _with_worker.discard(self)

    def _staging_buffer_bytes(self) -> int:
        """As large as the page-lock budget allows."""
        nbytes, left = STAGING_BUFFER_BYTES, self._pin_budget.left_bytes // staging_buffers()
        while nbytes > left and nbytes // 2 >= LEAST_STAGING_BUFFER_BYTES:
            nbytes //= 2
        return nbytes if nbytes <= left else STAGING_BUFFER_BYTES

    def _allocate_staging(self) -> None:
        self._piece_bytes = self._staging_buffer_bytes()
        nbytes = staging_buffers() * self._piece_bytes
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
                        self._staging_block = PinnedBlock(self._device, self._pin_budget, nbytes)
                        memory = self._staging_block.tensor
                except (RuntimeError, MemoryError) as error:
                    _report_pageable(str(error))
            if memory is None:
                memory = torch.empty(nbytes, dtype=torch.uint8)
            self.staging_locked_bytes = nbytes if memory.is_pinned() else 0
            self._staging_memory = memory
            self._staging, self._next_staging = [], 0
            for piece in memory.split(self._piece_bytes):
                free = self._device.new_event()
                free.record(self.stream)
                self._staging.append((piece, free))

    def submit(self, transfer: Transfer, followers: Sequence[Transfer] = ()) -> None:
        """Begins `transfer`; `transfer.ready` can be waited for when it is `issued`.

        followers: come with it in one copy: their masters and their targets lie behind its own, in their
        order. Only where transfers are not `staged`.
        """
        for one in (transfer, *followers):
            one.take_events(self._spare_events, self._device)
            self.h2d_bytes += one.layer.payload_bytes
        if followers:
            self._issue_together(transfer, followers)
        elif self._queue is not None:
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

    def _issue(self, transfer: Transfer) -> None:
        try:
            self._begin(transfer)
            wanted = not transfer.cancelled and transfer.error is None
            if wanted and not self._copied_directly(transfer, transfer.layer.payload_bytes):
                if self.staged:  # On the worker, whose stream it is.
                    self._copy(transfer)
                else:
                    self._device.issue_on(self.stream, self._copy, transfer)
            transfer.events.ready.record(self.stream)
        except BaseException as error:
            transfer.error = error
        finally:
            _settle(transfer)

    def _issue_together(self, leader: Transfer, followers: Sequence[Transfer]) -> None:
        assert not self.staged
        for one in followers:
            one.leader = leader
            leader.after = (*leader.after, *one.after)
        try:
            self._begin(leader)
            if leader.error is None:
                nbytes = sum(one.layer.payload_bytes for one in (leader, *followers))
                if not self._copied_directly(leader, nbytes):
                    self._device.issue_on(self.stream, _copy_locked, (leader, nbytes))
            leader.events.ready.record(self.stream)
        except BaseException as error:
            leader.error = error
        finally:
            for one in (leader, *followers):
                one.recorded, one.error = leader.recorded, leader.error
                _settle(one)

    def _begin(self, transfer: Transfer) -> None:
        try:
            last = None
            for earlier in transfer.after:
                done = earlier.done
                if done is not last:
                    done.wait(self.stream)
                    last = done
                earlier.read_by = None  # Nobody asks again, and it may have come in the same copy: a cycle.
            transfer.events.started.record(self.stream)
            transfer.recorded = True
        except Exception as error:
            transfer.error = error

    def _copied_directly(self, transfer: Transfer, nbytes: int) -> bool:
        """Copies so many bytes, those of `transfer` and of what lies behind it, where torch is not needed for
        it. Returns whether it did."""
        home = transfer.layer.home
        # An abandoned one has no target any more: torch says what is wrong with it.
        if self.direct is None or not home.page_locked or not transfer.target.numel():
            return False
        assert home.payload is not None
        return self.direct(transfer.target, home.payload, nbytes)

    def _copy(self, transfer: Transfer) -> None:
        home, target = transfer.layer.home, transfer.target
        if self._device.is_host:
            home.read_into(target, 0)
        elif home.page_locked:
            assert home.payload is not None
            target.copy_(home.payload, non_blocking=True)
        elif home.payload is not None:
            target.copy_(home.payload)
        else:
            memory = torch.empty(target.numel(), dtype=torch.uint8)
            home.read_into(memory, 0)
            target.copy_(memory)

    # -------------------------------------------------------------------------------------- the worker thread
    def _work(self, items: queue.SimpleQueue[Transfer | threading.Event | None]) -> None:
        """The worker's loop, until it gets None: reads ahead, and copies in the order of the items."""
        with self._device.on_stream(self.stream):
            while True:
                try:
                    item = items.get(block=not self._under_way)
                except queue.Empty:
                    self._carry_out_first()
                    continue
                if item is None:
                    self._carry_out_all()
                    return
                for one in self._divided(item):
                    self._under_way.append(one)
                    del one
                    while self._under_way and (len(self._under_way) > self._most_under_way or self._is_due()):
                        self._carry_out_first()
                del item  # A transfer that nobody else holds on to leaves its events to the next one.

    def _divided(self, item: Transfer | threading.Event) -> Iterator[Item]:
        """The pieces of what is read through staging, each begun to be read; else `item`."""
        if isinstance(item, threading.Event) or not self._is_read_in_pieces(item):
            yield item
            return
        start, end = 0, item.target.numel()
        try:
            for target in item.target.split(self._piece_bytes):
                buffer, free = self._staging[self._next_staging]
                self._next_staging = (self._next_staging + 1) % len(self._staging)
                if not free.query():
                    free.synchronize()
                nbytes = target.numel()
                if nbytes < self._piece_bytes:
                    buffer = buffer[:nbytes]
                reading = self.reader.begin(item.layer.home, buffer, start)
                yield Piece(item, target, reading, free, (start == 0, start + nbytes == end))
                start += nbytes
        except Exception as error:
            yield Piece(item, item.target, Failed(error), None, (start == 0, True))

    def _is_read_in_pieces(self, transfer: Transfer) -> bool:
        return bool(self._staging) and not transfer.layer.home.page_locked and not transfer.cancelled

    @property
    def _most_under_way(self) -> int:
        """Fewer than there are buffers: one that is filled again has been handed to the device before."""
        return max(0, len(self._staging) - BEING_COPIED)

    def _is_due(self) -> bool:
        first = self._under_way[0]
        return not isinstance(first, Piece) or first.reading.needs_no_waiting

    def _carry_out_all(self) -> None:
        while self._under_way:
            self._carry_out_first()

    def _carry_out_first(self) -> None:
        item = self._under_way.popleft()
        if isinstance(item, threading.Event):
            item.set()
        elif isinstance(item, Transfer):
            self._issue(item)
        else:
            self._issue_piece(item)

    def _issue_piece(self, piece: Piece) -> None:
        transfer = piece.transfer
        if piece.is_first:
            self._begin(transfer)  # What its reading is waited for counts: it is as slow as that.
        error = self.reader.finish(piece.reading)
        try:
            if error is not None:
                raise error
            if transfer.error is None and isinstance(piece.reading, Reading):
                piece.target.copy_(piece.reading.destination, non_blocking=True)
                piece.free.record(self.stream)
                if piece.is_last:
                    transfer.events.ready.record(self.stream)
        except BaseException as raised:
            transfer.error = transfer.error or raised
        finally:
            if piece.is_last:
                _settle(transfer)


def _copy_locked(work: tuple[Transfer, int]) -> None:
    """Copies so many bytes, those of a transfer and of what lies behind it."""
    transfer, nbytes = work
    payload = transfer.layer.home.payload
    assert payload is not None
    source, target = (
        one.as_strided((nbytes,), (1,), one.storage_offset()) for one in (payload, transfer.target)
    )
    target.copy_(source, non_blocking=True)


def _settle(transfer: Transfer) -> None:
    """All of it has been handed to the device, or never will be."""
    transfer.after = ()  # Their events are free for others now.
    transfer.issued = True
    if transfer.events.issued is not None:
        transfer.events.issued.set()


def _report_pageable(reason: str) -> None:
    ledger.message(
        f"Staging buffers are ordinary RAM, which makes CPU and Disk slower: {reason}. "
        "Allow less page-locked memory.",
        "warning",
    )

"""The ring: one preallocated run of device memory that swapped layers pass through, slot by slot.

Pure bookkeeping over byte positions that only ever grow; a position's place in the buffer is its remainder.
Slots are taken in order and never wrap around the end of the buffer, so that a payload is always one
contiguous copy.
"""

from __future__ import annotations

from collections import deque
from typing import Any


class Slot:
    """A stretch of the ring. `start` and `end` are positions, `offset` is the place of `start` in the
    buffer."""

    __slots__ = ("end", "free", "offset", "previous_head", "reader", "start")

    def __init__(self, start: int, end: int, offset: int, previous_head: int) -> None:
        self.start, self.end, self.offset = start, end, offset
        self.previous_head = previous_head
        self.free = False
        self.reader: Any = None


class Ring:
    """Slots of `capacity_bytes` bytes, first in, first out."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._head = 0
        self._slots: deque[Slot] = deque()
        self._retired: deque[Slot] = deque()  # those that have been read, by position

    @property
    def room_bytes(self) -> int:
        """Not in slots; a slot may find less, since it does not wrap around the end of the buffer."""
        used = self._head - self._slots[0].start if self._slots else 0
        return self.capacity_bytes - used

    def take(self, nbytes: int) -> Slot | None:
        """The next `nbytes`, or None while the oldest slots are still in use."""
        start = self._head
        room = self.capacity_bytes - start % self.capacity_bytes if self.capacity_bytes else 0
        if nbytes > room:
            start += room  # What is left before the end of the buffer is too short: it is skipped.
        tail = self._slots[0].start if self._slots else start
        if nbytes > self.capacity_bytes or start + nbytes - tail > self.capacity_bytes:
            return None
        slot = Slot(start, start + nbytes, start % self.capacity_bytes, self._head)
        self._head = slot.end
        self._slots.append(slot)
        return slot

    def discard(self, slot: Slot) -> None:
        """Takes back a slot that nothing has read, as if it had never been, where it was the last one
        taken."""
        if self._slots and self._slots[-1] is slot:
            self._slots.pop()
            self._head = slot.previous_head
        else:
            slot.free = True
            self._reclaim()

    def release(self, slot: Slot, reader: Any) -> None:
        """The slot may be written again once `reader`, whatever that is, has read it."""
        slot.free, slot.reader = True, reader
        self._reclaim()

    def _reclaim(self) -> None:
        while self._slots and self._slots[0].free:
            slot = self._slots.popleft()
            if slot.reader is not None:
                self._retired.append(slot)

    def readers(self) -> list[Any]:
        """All readers that nobody has been told to wait for yet; nobody will be told again."""
        readers = [slot.reader for slot in self._retired]
        self._retired.clear()
        return readers

    def wait_for(self, slot: Slot) -> list[Any]:
        """The readers after which `slot` may be written: those of the slots that lay there one round ago.
        Each is returned once."""
        # `take` gives nothing that reaches into a slot in use, so that all of them have been reclaimed.
        end = slot.end - self.capacity_bytes
        readers = []
        while self._retired and self._retired[0].start < end:
            readers.append(self._retired.popleft().reader)
        return readers

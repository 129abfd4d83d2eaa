"""Whose turn it is on a device: a step's, or that of a thread which changes what lies there."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Hashable, Iterator

LONGEST_WAIT_S = 600.0
"""Longer than a step takes: then whoever had the turn has forgotten it."""

LOOK_S = 1.0
"""From one look to the next whether the thread that is waited for still lives."""


class Turn:
    """A lock that belongs to one thread at a time, for as long as a step or a `held` block of it lasts.

    A step that nobody ends blocks others until the end of the thread's next one of the same model, its death,
    or for LONGEST_WAIT_S.
    """

    def __init__(self) -> None:
        # Reentrant: garbage collection, which runs anywhere, may unload a model here.
        self._free = threading.Condition(threading.RLock())
        self._owner: threading.Thread | None = None
        self._blocks = 0
        self._steps: list[Hashable] = []  # A model's forward may run within another's.

    @property
    def is_mine(self) -> bool:
        """Whether no other thread can run a step, or change anything, before the calling one is done."""
        return self._owner is threading.current_thread()

    @property
    def is_mine_or_free(self) -> bool:
        """Whether the calling thread would not have to wait now."""
        return self._owner in (None, threading.current_thread())

    def begin_step(self, root: Hashable) -> None:
        """A step of the model `root` begins in the calling thread, once it is its turn."""
        with self._free:
            self._take()
            self._forget_from(root)  # It cannot run within itself: that one was never ended.
            self._steps.append(root)

    def end_step(self, root: Hashable) -> None:
        """It is over, and what ran within it. Idempotent, and nothing where another thread's turn has
        come."""
        with self._free:
            if self._owner is threading.current_thread():
                self._forget_from(root)
                self._leave()

    def _forget_from(self, root: Hashable) -> None:
        if root in self._steps:
            del self._steps[self._steps.index(root) :]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other thread runs a step or changes anything. Reentrant, in steps as well."""
        with self._free:
            self._take()
            self._blocks += 1
        try:
            yield
        finally:
            with self._free:
                if self._owner is threading.current_thread():
                    self._blocks = max(0, self._blocks - 1)  # Less: it was taken away meanwhile.
                    self._leave()

    def _take(self) -> None:
        me = threading.current_thread()
        if self._owner is me:
            return
        until = time.monotonic() + LONGEST_WAIT_S
        while self._owner is not None and self._owner.is_alive() and time.monotonic() < until:
            self._free.wait(LOOK_S)
        self._owner, self._blocks = me, 0
        self._steps.clear()

    def _leave(self) -> None:
        if not self._blocks and not self._steps:
            self._owner = None
            self._free.notify()

"""Times of work on this machine, for limits that are to hold for the work and not for the machine."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

UNIT_S = 0.01


def own_seconds(work: Callable[[], object]) -> float:
    """What `work` takes this thread, whatever else the machine does."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def comparable_seconds(work: Callable[[], object]) -> float:
    """The same, less by as much as this machine is slower just now than a current desktop processor."""
    unit = own_seconds(_unit)
    seconds = own_seconds(work)
    unit = max(unit, own_seconds(_unit))
    return seconds / max(1.0, unit / UNIT_S)


def _unit() -> None:
    """Interpreted work of UNIT_S on one core of a current desktop processor."""
    window, layout, index = bytes(4096), struct.Struct("<Q"), 0
    for _ in range(100_000):
        index = (index + 8 + layout.unpack_from(window, index)[0]) % 4000

"""What QSwap has to say inside Forge: one `[QSwap]` line in the console, and the same line in the panel."""

from __future__ import annotations

import collections
import functools
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

Level = Literal["error", "warning", "info", "debug"]
LEVELS: tuple[Level, ...] = ("error", "warning", "info", "debug")

P = ParamSpec("P")
R = TypeVar("R")

_KEPT = 50
_lock = threading.Lock()
_notices: collections.deque[dict[str, Any]] = collections.deque(maxlen=_KEPT)
_said: set[str] = set()
_console_level: Level = "info"


def set_console_level(level: Level) -> None:
    """Which notices reach the console; the panel has them all."""
    global _console_level
    _console_level = level


def notice(text: str, level: Level = "info", *, once: bool = False) -> None:
    """Says one sentence. `once`: only the first time that this very sentence comes up since the start."""
    with _lock:
        if once and text in _said:
            return
        _said.add(text)
        _notices.append({"t": time.time(), "level": level, "text": text})
    if LEVELS.index(level) <= LEVELS.index(_console_level):
        print(f"[QSwap] {text}", flush=True)


def recent() -> list[dict[str, Any]]:
    """The last notices, oldest first, as the snapshot's `messages`: `{"t": seconds since the epoch, "level",
    "text"}`."""
    with _lock:
        return list(_notices)


def fails_soft(fallback: R) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For callbacks that the host runs: an exception becomes one notice and `fallback` is returned, so that
    the page and the generation go on."""

    def decorate(callback: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(callback)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return callback(*args, **kwargs)
            except Exception as error:
                notice(f"{callback.__name__}: {type(error).__name__}: {error}", "error", once=True)
                return fallback

        return guarded

    return decorate

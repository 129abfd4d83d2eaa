"""What QSwap has to say inside Forge: one `[QSwap]` line in the console, and the same line in the panel (the
ledger's messages)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

from lib_qswap.swap import ledger

Level = Literal["error", "warning", "info", "debug"]
LEVELS: tuple[Level, ...] = ("error", "warning", "info", "debug")

P = ParamSpec("P")
R = TypeVar("R")

_said: set[str] = set()


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(f"[QSwap] {record.getMessage()}", flush=True)


def to_console(level: Level) -> None:
    """Lets QSwap's log, from here and from the parts that do not know Forge, reach the console from `level`
    on. The panel has it all."""
    ledger.log.setLevel(level.upper())
    if not any(type(handler).__qualname__ == _Console.__qualname__ for handler in ledger.log.handlers):
        ledger.log.addHandler(_Console())
        ledger.log.propagate = False


def notice(text: str, level: Level = "info", *, once: bool = False, again: bool = False) -> None:
    """Says one sentence. `once`: only the first time that this very sentence comes up since the start;
    `again`: each time, where else a sentence comes to the console once."""
    if once and text in _said:
        return
    _said.add(text)
    ledger.message(text, level, again=again)


def fails_soft(fallback: R) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For callbacks that the host runs: an exception becomes one notice and `fallback` is returned, so that
    the page and the generation go on."""

    def decorate(callback: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(callback)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return callback(*args, **kwargs)
            except Exception as error:
                notice(f"{callback.__name__.strip('_')}: {type(error).__name__}: {error}", "error")
                return fallback

        return guarded

    return decorate

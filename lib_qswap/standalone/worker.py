"""Generations in the background, one at a time, for a page that looks in from time to time."""

from __future__ import annotations

import logging
import threading
from typing import NamedTuple

from lib_qswap.standalone.denoise import Denoised
from lib_qswap.standalone.host import Settings, StandaloneHost, Summary

log = logging.getLogger("qswap")

# How long a step may take to notice that it is the last one.
STOP_TIMEOUT_S = 30.0


class Status(NamedTuple):
    """What a page shows. `finished` counts generations: when it has grown there is another result to show."""

    running: bool = False
    text: str = "Nothing generated yet."
    share: float = 0.0
    finished: int = 0
    result: tuple[Denoised, Summary] | None = None


class Stopped(Exception):
    """Ends a generation between two steps."""


class Worker:
    """Runs the host's generations on a thread of its own.

    Attributes:
        status: the latest, replaced as a whole, so that any thread may read it.
    """

    def __init__(self, host: StandaloneHost) -> None:
        self.status = Status()
        self._host = host
        self._stop = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, settings: Settings) -> bool:
        """Begins a generation with these settings; False if one is running."""
        with self._starting:
            if self._stop.is_set() or (self._thread is not None and self._thread.is_alive()):
                return False
            self.status = self.status._replace(running=True, text="Placing the weights ...", share=0.0)
            self._thread = threading.Thread(
                target=self._run, args=(settings,), name="qswap-generate", daemon=True
            )
            self._thread.start()
        return True

    def stop(self) -> None:
        """Ends a running generation after its step, and waits for that; nothing can be started afterwards."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self, settings: Settings) -> None:
        try:
            if settings != self._host.settings:
                self._host.use(settings)
            self.status = self.status._replace(text=f"Step 1 of {settings.steps} ...")
            result = self._host.generate(self._after_step)
        except Stopped:
            self.status = self.status._replace(running=False, text="Stopped.")
        except (
            Exception
        ) as error:  # The page must say so, whatever it was; the thread has nobody else to tell.
            log.exception("The generation failed")
            self.status = self.status._replace(running=False, text=f"Failed: {error}")
        else:
            text = f"{settings.steps} steps in {sum(result[1].step_seconds):.1f} s."
            self.status = Status(False, text, 1.0, self.status.finished + 1, result)

    def _after_step(self, done: int) -> None:
        if self._stop.is_set():
            raise Stopped
        steps = self._host.settings.steps
        self.status = self.status._replace(
            text=f"Step {min(done + 1, steps)} of {steps} ...", share=done / steps
        )

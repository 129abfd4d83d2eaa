"""What all models on one device share: the page-lock budget, the copier, the ring, the scratch."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from lib_qswap.swap import ledger
from lib_qswap.swap.copier import Copier
from lib_qswap.swap.device import Device
from lib_qswap.swap.execute import Scratch
from lib_qswap.swap.home import PinBudget, default_pin_budget_bytes
from lib_qswap.swap.streamer import Streamer
from lib_qswap.swap.turn import Turn

if TYPE_CHECKING:
    from lib_qswap.swap.manager import Attachment


class DeviceState:
    """One device: its budget, copier, ring and scratch, and the models that use them now.

    Attributes:
        turn: whose turn it is to run a step or to change what is on the device.
        gone: models that nobody holds any more, and that are still to be unloaded.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.pin_budget = PinBudget(default_pin_budget_bytes())
        self.copier = Copier(device, self.pin_budget)
        self.streamer = Streamer(device, self.copier)
        self.scratch = Scratch(device)
        self.turn = Turn()
        self.active: weakref.WeakSet[Attachment] = weakref.WeakSet()
        self.gone: deque[Attachment] = deque()
        self._changes = 0
        self._thread: int | None = None

    @property
    def shared_bytes(self) -> int:
        """Device bytes of ring and scratch."""
        return self.streamer.ring_bytes + self.scratch.nbytes

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Inside, nothing else changes what is on the device."""
        with self.turn.held():
            self.enter()
            self._changes += 1
            try:
                yield
            finally:
                self._changes -= 1
                self.sweep()

    def enter(self) -> None:
        """The calling thread runs or places models from now on."""
        self._thread = threading.get_ident()
        self.sweep()

    def sweep(self) -> None:
        """Unloads the models that are gone. Garbage collection, which ends many of them, runs anywhere:
        inside the streamer, on the threads of the copier, its readers or the page, or while another model has
        a layer leased; then the next call on the thread that runs the models does it."""
        while self.gone and not self._changes and self._thread in (None, threading.get_ident()):
            if not self.turn.is_mine_or_free or not self.streamer.idle(besides=self.gone[0].layers):
                return
            self.gone.popleft().release()

    def fit(self) -> None:
        """Gives ring, scratch and staging the sizes that the active models need. Only between steps."""
        ring = max((model.plan.ring_bytes for model in self.active if model.plan is not None), default=0)
        scratch = max((model.scratch_bytes for model in self.active), default=0)
        self.streamer.resize(ring)
        self.scratch.resize(scratch)
        # Starting and ending the worker locks and unlocks memory: not each time that models take turns.
        models = [m for m in ledger.attachments() if m.state is self] if self.copier.staged else self.active
        self.copier.use_worker(any(model.needs_worker() for model in models))


_states: dict[torch.device, DeviceState] = {}


def state_of(device: Device) -> DeviceState:
    """The one state of a device."""
    return _states.get(device.device) or _states.setdefault(device.device, DeviceState(device))

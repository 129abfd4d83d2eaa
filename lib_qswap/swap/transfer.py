"""One payload on its way to the device, and the events that order and time it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lib_qswap.swap.device import Device

if TYPE_CHECKING:
    from lib_qswap.swap.layer import Layer
    from lib_qswap.swap.ring import Slot


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
        leader: the transfer whose copy brings these bytes as well; None: it has a copy of its own.
        awaited_on: the stream that waits for its copy, if any.
        read_by: the transfer given back together with it whose event `done` stands for both, until that has
            been waited for; None: its own.
        error: why the bytes are not there, if so.
    """

    __slots__ = (
        "_spare",
        "after",
        "awaited",
        "awaited_on",
        "cancelled",
        "error",
        "events",
        "issued",
        "layer",
        "leader",
        "parts",
        "read_by",
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
        self.leader: Transfer | None = None
        self.read_by: Transfer | None = None
        self.awaited_on: Any = None
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
    def started(self) -> Any:
        """The event before the copy that brings its bytes."""
        return self.events.started if self.leader is None else self.leader.events.started

    @property
    def ready(self) -> Any:
        """The event behind that copy."""
        return self.events.ready if self.leader is None else self.leader.events.ready

    @property
    def done(self) -> Any:
        """The event behind what reads its target."""
        return self.events.done if self.read_by is None else self.read_by.events.done

    @property
    def begun(self) -> bool:
        """Whether bytes are on their way: the device has come to the copy."""
        return self.recorded and bool(self.started.query())

    @property
    def arrived(self) -> bool:
        """Whether all bytes are there."""
        return self.issued and self.error is None and bool(self.ready.query())

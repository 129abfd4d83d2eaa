"""The weights of one layer on the device, for as long as something that is enqueued has to read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from lib_qswap.swap.layer import Layer
    from lib_qswap.swap.streamer import Streamer
    from lib_qswap.swap.timeline import Timeline
    from lib_qswap.swap.transfer import Transfer


class ResidentLease:
    """The weights of a layer that has a permanent copy on the device."""

    __slots__ = ("parts",)
    in_ring = False

    def __init__(self, parts: dict[str, torch.Tensor]) -> None:
        self.parts = parts

    def release(self) -> None:
        """Nothing to give back."""


class MeasuredLease(ResidentLease):
    """The same, in a step that is measured."""

    __slots__ = ("_layer", "_timeline")

    def __init__(self, layer: Layer, timeline: Timeline) -> None:
        super().__init__(layer.lease.parts)
        self._layer: Layer | None = layer
        self._timeline = timeline

    def release(self) -> None:
        """The weights have been read: of interest should the layer be swapped one day. Idempotent."""
        layer, self._layer = self._layer, None
        if layer is not None:
            self._timeline.read(layer)


class Lease:
    """The weights of a swapped layer, valid for work that is issued to the compute stream before
    `release`."""

    __slots__ = ("_streamer", "parts", "transfer")
    in_ring = True

    def __init__(self, parts: dict[str, torch.Tensor], transfer: Transfer, streamer: Streamer) -> None:
        self.parts = parts
        self.transfer: Transfer | None = transfer
        self._streamer = streamer

    def release(self) -> None:
        """All that reads the weights is enqueued: their slot may be filled again behind it. Idempotent."""
        transfer, self.transfer = self.transfer, None
        if transfer is not None:
            self._streamer.release(transfer)


AnyLease: TypeAlias = "Lease | ResidentLease"

"""Where masters live: page-locked RAM (shared), ordinary RAM (cpu), or the model's own file (disk).

A home's kind is read off its storage once, when it is bound; it is never what a setting asked for.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch

from lib_qswap.swap import planner
from lib_qswap.swap.device import Device
from lib_qswap.swap.ram import available_ram_bytes, total_ram_bytes

if TYPE_CHECKING:
    from lib_qswap.swap.layer import Layer, Part

HomeKind = Literal["shared", "cpu", "disk"]
Location = Literal["auto", "gpu", "shared", "cpu", "disk"]
LOCATIONS: tuple[Location, ...] = ("auto", "gpu", "shared", "cpu", "disk")

RAM_RESERVE_BYTES = 1536 << 20
"""RAM that placing weights leaves to everybody else."""

WORTH_SAYING_BYTES = 16 << 20
"""That stay in RAM although they should not: less is nothing that a user would miss."""


class PinBudget:
    """How many bytes may be page-locked, and how many are. Staging takes its share first."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    @property
    def left_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)

    def take(self, nbytes: int) -> bool:
        """Counts `nbytes` as page-locked if they fit."""
        if nbytes > self.left_bytes:
            return False
        self.used_bytes += nbytes
        return True

    def give(self, nbytes: int) -> None:
        self.used_bytes -= nbytes


def default_pin_budget_bytes(used_bytes: int = 0) -> int:
    """40 % of RAM on Windows (its own limit is about half, shared with every process); elsewhere 60 %, or
    what is available less 4 GB if that is less. `used_bytes`: what is page-locked already, and therefore no
    longer available, but part of the budget."""
    if sys.platform == "win32":
        return int(total_ram_bytes() * 0.4)
    return max(0, int(min(total_ram_bytes() * 0.6, available_ram_bytes() + used_bytes - (4 << 30))))


class Owner(Protocol):
    """Host memory that homes are in. nbytes: what it takes, of the page-lock budget too where it is
    locked."""

    @property
    def nbytes(self) -> int: ...


class Home:
    """One layer's master.

    Attributes:
        kind: read off the storage.
        payload: the whole payload as one run of host memory (uint8, flat), or None where its parts lie apart.
        page_locked: whether the device can read `payload` by itself.
        owner: of the memory that `payload` is part of; it lives, page-locked or not, as long as one of its
            layers does.
    """

    __slots__ = ("_begin", "_end", "_parts", "kind", "owner", "page_locked", "payload")

    def __init__(
        self, parts: Sequence[Part], payload: torch.Tensor | None = None, owner: Owner | None = None
    ) -> None:
        self._parts = parts
        self.owner = owner
        self.payload = payload
        self.page_locked = payload is not None and payload.is_pinned()
        self._begin = 0 if payload is None else payload.data_ptr()
        self._end = 0 if payload is None else self._begin + payload.numel()
        self.kind: HomeKind = "cpu"
        if self.page_locked:
            self.kind = "shared"
        elif payload is None and any(part.source is not None for part in parts):
            self.kind = "disk"

    def read_into(self, destination: torch.Tensor, start_byte: int) -> None:
        """Copies payload bytes from `start_byte` on into `destination` (uint8, flat, in host memory), as many
        as it holds.

        The interpreter lock is free meanwhile. Bytes between parts are left as they are.

        Raises:
            OSError, GGUFError: the file can no longer be read.
        """
        nbytes = destination.numel()
        end_byte = start_byte + nbytes
        if self.payload is not None:
            _copy(self.payload, start_byte, destination)
            return
        for part in self._parts:
            first = max(part.offset_bytes, start_byte)
            last = min(part.offset_bytes + part.nbytes, end_byte)
            if first >= last:
                continue
            target = destination
            if last - first < nbytes:
                target = destination[first - start_byte : last - start_byte]
            if part.source is not None:
                part.source.read_into(target, first - part.offset_bytes)
            else:
                assert part.data is not None
                _copy(part.data, first - part.offset_bytes, target)

    def follows(self, other: Home) -> bool:
        """Whether the device can read its payload in one piece with that of `other`, right before it."""
        one = self.page_locked and self.owner is not None and self.owner is other.owner
        return one and self._begin == other._end

    def tensor(self, part: Part) -> torch.Tensor:
        """The master of `part`, for whoever reads the module's parameters."""
        if self.payload is not None:
            return part.wrap(self.payload[part.offset_bytes : part.offset_bytes + part.nbytes], part.source)
        assert part.data is not None
        return part.wrap(part.data, part.source)


def _copy(source: torch.Tensor, start_byte: int, destination: torch.Tensor) -> None:
    """One plain memcpy: on one thread, so that it leaves the other cores to compute. Of addresses: slicing a
    tensor gives up the interpreter lock, too, and to get it back from the thread that computes takes long."""
    ctypes.memmove(destination.data_ptr(), source.data_ptr() + start_byte, destination.numel())


class Placement(NamedTuple):
    """Which layers go where; `message` says what could not be had, and what to do about it."""

    shared: list[Layer]
    cpu: list[Layer]
    disk: list[Layer]
    message: str | None


def choose_homes(
    layers: Sequence[Layer], location: Location, device: Device, pin_budget: PinBudget
) -> Placement:
    """Homes for `layers` (in execution order): the location that the user chose, stepping down where it
    cannot be had.

    What does not fit into the page-lock budget, or into RAM, alternates with what does over the execution
    order, so that no stretch of a step is all slow.
    """
    shared: list[Layer] = []
    rest = list(layers)
    reasons: list[str] = []
    if location in ("auto", "gpu", "shared"):
        if not device.can_page_lock:
            if location == "shared":
                reasons.append(f"{device.device.type} has no page-locked memory, so Shared is CPU here")
        else:
            shared, rest = _share_locks(layers, pin_budget)
            if rest and location == "shared":
                reasons.append(
                    f"{_mb(rest)} MB do not fit into the page-lock budget of "
                    f"{pin_budget.limit_bytes / 2**20:.0f} MB"
                )
    disk: list[Layer] = []
    cpu = rest
    if location == "disk":
        disk = [layer for layer in rest if has_file(layer)]
        cpu = [layer for layer in rest if not has_file(layer)]
        if bytes_of(cpu) >= WORTH_SAYING_BYTES:
            reasons.append(f"{_mb(cpu)} MB have no file to be read from and stay in RAM")
    elif (need := sum(map(_new_ram_bytes, [*shared, *rest]))) > (
        room := available_ram_bytes() - RAM_RESERVE_BYTES
    ):
        movable = [layer for layer in rest if _new_ram_bytes(layer)]
        _, out = _share(movable, max(0, bytes_of(movable) - (need - room)))
        disk = [layer for layer in out if has_file(layer)]
        gone = {id(layer) for layer in disk}
        cpu = [layer for layer in rest if id(layer) not in gone]
        # A page-lock budget says nothing of what is left: locking it, too, would take it from everybody.
        if (still := need - bytes_of(disk) - room) > 0:
            movable = [layer for layer in shared if _new_ram_bytes(layer) and has_file(layer)]
            _, out = _share(movable, max(0, bytes_of(movable) - still))
            gone = {id(layer) for layer in out}
            shared = [layer for layer in shared if id(layer) not in gone]
            disk += out
        if disk:
            reasons.append(f"{_mb(disk)} MB do not fit into RAM and are read from the file")
    return Placement(shared, cpu, disk, "; ".join(reasons) or None)


def _share_locks(layers: Sequence[Layer], budget: PinBudget) -> tuple[list[Layer], list[Layer]]:
    """Which of `layers` are page-locked within the budget, and which are not. Those that are locked stay so,
    by whole arenas, as many as fit: part of an arena cannot be given back."""
    owners = {id(lay.home.owner): lay.home.owner for lay in layers if lay.home.page_locked}
    room_bytes = budget.limit_bytes - budget.used_bytes
    room_bytes += sum(owner.nbytes for owner in owners.values() if owner is not None)
    kept: set[int] = set()
    for key, owner in owners.items():
        if owner is not None and owner.nbytes <= room_bytes:
            kept.add(key)
            room_bytes -= owner.nbytes
    inside = {id(layer) for layer in layers if layer.home.page_locked and id(layer.home.owner) in kept}
    more, _ = _share([layer for layer in layers if not layer.home.page_locked], max(0, room_bytes))
    inside.update(map(id, more))
    return [lay for lay in layers if id(lay) in inside], [lay for lay in layers if id(lay) not in inside]


def _share(layers: Sequence[Layer], room_bytes: int) -> tuple[list[Layer], list[Layer]]:
    """Spreads `room_bytes` over `layers`: (those that get in, the others)."""
    total = bytes_of(layers)
    if total <= room_bytes:
        return list(layers), []
    chosen = planner.spread([layer.payload_bytes for layer in layers], room_bytes / total if total else 0.0)
    inside: list[Layer] = []
    outside: list[Layer] = []
    for layer, wanted in zip(layers, chosen, strict=True):
        if wanted and layer.payload_bytes <= room_bytes:
            room_bytes -= layer.payload_bytes
            inside.append(layer)
        else:
            outside.append(layer)
    return inside, outside


def bytes_of(layers: Iterable[Layer]) -> int:
    return sum(layer.payload_bytes for layer in layers)


def _mb(layers: Iterable[Layer]) -> str:
    return f"{bytes_of(layers) / 2**20:.0f}"


def has_file(layer: Layer) -> bool:
    return any(part.source is not None for part in layer.parts)


def _new_ram_bytes(layer: Layer) -> int:
    """RAM that a copy of the layer would take beyond what it takes now."""
    return layer.payload_bytes if layer.home.kind == "disk" else 0

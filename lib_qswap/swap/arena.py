"""Arenas: masters copied into RAM of the exact size, page-locked where the device can read them there by
itself."""

from __future__ import annotations

import concurrent.futures
import contextlib
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from lib_qswap.swap.device import Device, align
from lib_qswap.swap.home import Home, Owner, PinBudget, bytes_of, has_file

if TYPE_CHECKING:
    from lib_qswap.swap.layer import Layer

CHUNK_BYTES = 256 << 20
"""An arena is page-locked in pieces of about this size, so that a refusal costs one piece and not the
whole."""

TOGETHER_BYTES = 4 << 20
"""Layers that follow each other are in one piece as long as they are no more than this, and no more than an
eighth of a chunk, so that one copy can bring several small ones."""

FILL_THREADS = min(4, os.cpu_count() or 1)
"""Arenas that are filled at once: getting fresh memory from the system takes a core longer than reading a
file from its cache."""


BUDGET_USED_UP = "the page-lock budget is used up"


class HostBuffer(mmap.mmap):
    """Anonymous memory of an exact size, page-aligned, that gives its page-lock back when its last view
    goes."""

    @classmethod
    def of(cls, nbytes: int) -> HostBuffer:
        """`nbytes` of zeros.

        Raises:
            MemoryError: the system has not that much. (Windows counts what is promised, with its page file.)
        """
        try:
            if sys.platform == "win32":
                return cls(-1, nbytes)
            # Not shared, the default: such pages are a file's, and are swapped out and counted as one's.
            buffer = cls(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"the system has no {nbytes / 2**20:.0f} MB of RAM left") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # A kernel without them.
                buffer.madvise(mmap.MADV_HUGEPAGE)
        return buffer

    @property
    def nbytes(self) -> int:
        return len(self)

    _pin: tuple[Device, PinBudget, int, int] | None = None

    def lock(self, device: Device, budget: PinBudget, tensor: torch.Tensor) -> str | None:
        """Page-locks this memory for `device`. Returns None when that worked, else why it did not."""
        if self._pin is not None:
            return None
        if not budget.take(tensor.numel()):
            return BUDGET_USED_UP
        if reason := device.register(tensor):
            budget.give(tensor.numel())
            return reason
        self._pin = (device, budget, tensor.data_ptr(), tensor.numel())
        return None

    def unlock(self) -> None:
        """Makes it ordinary memory again; nothing may be reading it for a device."""
        if self._pin is not None:
            (device, budget, address, nbytes), self._pin = self._pin, None
            device.unregister(address)
            budget.give(nbytes)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.unlock()


class PinnedBlock:
    """Page-locked memory from torch's own allocator, for devices that cannot lock existing memory; it rounds
    up."""

    def __init__(self, device: Device, budget: PinBudget, nbytes: int) -> None:
        self._budget, self.nbytes = budget, 1 << (nbytes - 1).bit_length()
        if not budget.take(self.nbytes):
            self.nbytes = 0
            raise MemoryError(BUDGET_USED_UP)
        try:
            self.tensor = torch.empty(nbytes, dtype=torch.uint8).pin_memory(device.device)
        except RuntimeError:
            budget.give(self.nbytes)
            self.nbytes = 0
            raise

    def __del__(self) -> None:
        self._budget.give(self.nbytes)


def fill_arena(layers: Sequence[Layer], device: Device, pin_budget: PinBudget | None) -> str | None:
    """Copies the masters of `layers` into RAM of the exact size, page-locked if a budget is given, and makes
    it their home.

    Returns None, or why some of it could not be page-locked (it is ordinary RAM then), or had (it stays
    where it is).
    """
    registers = pin_budget is not None and device.can_register
    groups = _dealt(layers) if registers else _chunks(layers)
    refused: str | None = None
    with concurrent.futures.ThreadPoolExecutor(FILL_THREADS, "qswap-fill") as threads:
        # A few at a time: masters that are in no file are in RAM twice until their chunk is done.
        for i in range(0, len(groups), FILL_THREADS):
            arenas = []
            for group in groups[i : i + FILL_THREADS]:
                try:
                    owner, memory, reason = _allocate(
                        bytes_of(group), device, None if registers else pin_budget
                    )
                except MemoryError as error:
                    refused = str(error)
                    continue
                arenas.append((group, owner, memory))
                refused = reason or refused
            for _ in threads.map(lambda arena: _fill(arena[0], arena[2]), arenas):
                pass
            for group, owner, memory in arenas:
                if registers and pin_budget is not None and isinstance(owner, HostBuffer):
                    # After the copy: locking memory that has its pages already is several times faster.
                    refused = owner.lock(device, pin_budget, memory) or refused
                _settle(group, owner, memory)
    return refused


def whole_arenas(
    layers: Iterable[Layer], everyone: Iterable[Layer]
) -> Iterator[tuple[HostBuffer, list[Layer]]]:
    """The arenas in which there is nobody of `everyone` but `layers`, and nothing else, each with those."""
    wanted = set(layers)
    arenas: dict[int, list[Layer]] = {}
    for layer in everyone:
        if isinstance(layer.home.owner, HostBuffer):
            arenas.setdefault(id(layer.home.owner), []).append(layer)
    for inside in arenas.values():
        owner = inside[0].home.owner
        if isinstance(owner, HostBuffer) and wanted.issuperset(inside) and bytes_of(inside) == owner.nbytes:
            yield owner, inside


def lock_in_place(
    owner: HostBuffer, inside: Sequence[Layer], device: Device, budget: PinBudget
) -> str | None:
    """Page-locks an arena where it is: nothing is copied, and nothing is in RAM twice. Returns None when that
    worked, else why it did not."""
    reason = owner.lock(device, budget, torch.frombuffer(owner, dtype=torch.uint8))
    if reason is None:
        _look_again(inside)
    return reason


def unlock_in_place(owner: HostBuffer, inside: Sequence[Layer]) -> None:
    """Takes back what `lock_in_place`, or `fill_arena`, did to an arena; nothing may be reading it for a
    device."""
    owner.unlock()
    _look_again(inside)


def _look_again(inside: Iterable[Layer]) -> None:
    """What kind of home layers have is read off their arena once."""
    for layer in inside:
        layer.home = Home(layer.parts, layer.home.payload, layer.home.owner)


def _allocate(
    nbytes: int, device: Device, pin_budget: PinBudget | None
) -> tuple[Owner, torch.Tensor, str | None]:
    """Host memory of `nbytes`: (its owner, itself, None or why it is not page-locked although a budget is
    given)."""
    reason = None
    if pin_budget is not None:
        try:
            block = PinnedBlock(device, pin_budget, nbytes)
            return block, block.tensor, None
        except (RuntimeError, MemoryError) as error:
            reason = str(error)
    buffer = HostBuffer.of(nbytes)
    return buffer, torch.frombuffer(buffer, dtype=torch.uint8), reason


def _fill(layers: Sequence[Layer], memory: torch.Tensor) -> None:
    """Copies the masters of `layers` into `memory`, one behind the other."""
    start = 0
    for layer in layers:
        layer.home.read_into(memory[start : start + layer.payload_bytes], 0)
        start += layer.payload_bytes


def _settle(layers: Sequence[Layer], owner: Owner, memory: torch.Tensor) -> None:
    """Makes what `_fill` copied the layers' home."""
    start = 0
    for layer in layers:
        layer.home = Home(layer.parts, memory[start : start + layer.payload_bytes], owner)
        start += layer.payload_bytes
        for part in layer.parts:
            if part.source is None:
                part.data = None  # The arena has the only copy now.


def use_file(layers: Sequence[Layer]) -> None:
    """Makes the model's own file the home of `layers`; parts that are in no file stay in RAM, one by one."""
    for layer in layers:
        for part in layer.parts:
            if part.source is None and part.data is None:
                assert layer.home.payload is not None
                part.data = layer.home.payload[part.offset_bytes : part.offset_bytes + part.nbytes].clone()
        layer.home = Home(layer.parts)


def leave_arenas(layers: Iterable[Layer]) -> list[Layer]:
    """Takes back what `fill_arena` did: page-locks are given back, and RAM where a file has the same bytes.

    Returns the layers whose masters are elsewhere now.
    """
    arenas: dict[int, list[Layer]] = {}
    for layer in layers:
        if layer.home.payload is not None:
            arenas.setdefault(id(layer.home.owner), []).append(layer)
    moved: list[Layer] = []
    for inside in arenas.values():
        owner = inside[0].home.owner
        if isinstance(owner, HostBuffer) and not any(map(has_file, inside)):
            unlock_in_place(owner, inside)  # The only copy.
        else:
            use_file(inside)
            moved += inside
    return moved


def _dealt(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Groups of about a chunk each, of layers from all over the execution order: where the system refuses to
    page-lock some, those left out alternate with the others."""
    groups: list[list[Layer]] = [[] for _ in range(-(-bytes_of(layers) // CHUNK_BYTES))]
    filled = [0] * len(groups)
    most_bytes = min(TOGETHER_BYTES, CHUNK_BYTES // 8)
    least, together_bytes = 0, most_bytes
    for layer in layers:
        together_bytes += layer.payload_bytes
        if together_bytes > most_bytes:
            least, together_bytes = filled.index(min(filled)), layer.payload_bytes
        groups[least].append(layer)
        filled[least] += layer.payload_bytes
    return [group for group in groups if group]


def _chunks(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Groups that fill a chunk as far as they can: torch's allocator rounds each up to a power of two."""
    groups: list[list[Layer]] = []
    room = 0
    for layer in layers:
        if layer.payload_bytes > room or not groups:
            groups.append([])
            room = max(CHUNK_BYTES, align(layer.payload_bytes))
        groups[-1].append(layer)
        room -= layer.payload_bytes
    return groups

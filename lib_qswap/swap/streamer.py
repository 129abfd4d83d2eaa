"""Hands out the weights of layers at the moment they are used, and fetches those of the layers that come
next.

One streamer serves all models on a device: its ring is the only device memory that swapped layers need.
Nothing here waits for the device: the compute stream is ordered after a layer's copy, and a later copy into
the same slot after what has read it, by events. The calling thread waits only for the copier's worker to have
*issued* a copy.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from lib_qswap.swap.copier import Copier
from lib_qswap.swap.device import Device, align
from lib_qswap.swap.layer import Layer
from lib_qswap.swap.lease import AnyLease, Lease, MeasuredLease, ResidentLease
from lib_qswap.swap.order import Order
from lib_qswap.swap.ring import Ring, Slot
from lib_qswap.swap.timeline import Timeline
from lib_qswap.swap.transfer import Transfer
from lib_qswap.swap.uploads import Uploads, is_waiting

Views: TypeAlias = "tuple[torch.Tensor, dict[str, torch.Tensor]]"
"""A payload on the device, and the layer's tensors in it."""

KEPT_VIEWS = 4096

SMALL_COPY_S = 40e-6
TOGETHER_COPY_S = 80e-6
TOGETHER_RING_SHARE = 6
"""Layers whose bytes take less than SMALL_COPY_S on the link, about what issuing a copy takes the host, are
copied together, up to TOGETHER_COPY_S at once and to such a share of the ring: a copy that brings more waits
for more room, and is waited for longer."""
SLOWEST_LINK_BYTES_PER_S = 3e9
"""Of a GPU. Copies that are slower are small, and what they take is mostly not their bytes' time."""
NO_BYTES = torch.empty(0, dtype=torch.uint8)


class Streamer:
    """The ring of one device, what is in it, and what comes next.

    Attributes:
        misses: uses that were not predicted; each costs a copy that nothing hides.
        overflows: uses that found the ring full of leases and were served from memory outside the budget.
    """

    def __init__(self, device: Device, copier: Copier) -> None:
        self.device = device
        self.copier = copier
        self.order: Order[Layer] = Order()
        self.timeline = Timeline(device)
        self.misses = 0
        self.overflows = 0
        self.wrap = False
        self._lock = threading.Lock()
        self._uploads = Uploads()
        self._ring = Ring(0)
        self._buffer: torch.Tensor | None = None
        self._views: dict[tuple[int, Layer], Views] = {}
        self._waiting: tuple[Layer | None, int] = None, 0
        self._small_bytes = self._together_bytes = 0.0
        self._ahead: deque[Transfer] = deque()
        self._leased: dict[Transfer, None] = {}
        self._held: dict[Layer, ResidentLease] = {}
        self._retired: deque[Transfer] = deque(maxlen=64)
        self._unmarked: list[Transfer] = []
        self._unmarked_on: Any = None
        self._computed_on: Any = None

    # ------------------------------------------------------------------------------------------ between steps
    @property
    def ring_bytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.numel()

    def use_link(self, bytes_per_s: float) -> None:
        """Copies small layers together as it pays on a link of that bandwidth. Only between steps."""
        bytes_per_s = max(bytes_per_s, SLOWEST_LINK_BYTES_PER_S)
        self._small_bytes = bytes_per_s * SMALL_COPY_S
        self._together_bytes = bytes_per_s * TOGETHER_COPY_S

    def resize(self, ring_bytes: int) -> None:
        """Gives the ring another size (0: none). What was fetched ahead is dropped. Only between steps.

        Raises:
            torch.OutOfMemoryError: the device has not that much; the ring is then empty.
        """
        with self._lock:
            self._quiesce()
            if align(ring_bytes) == self.ring_bytes:
                return
            self._buffer = None
            self._ring = Ring(0)
            if ring_bytes:
                with torch.inference_mode(False):
                    self._buffer = torch.empty(
                        align(ring_bytes), dtype=torch.uint8, device=self.device.device
                    )
                self._ring = Ring(self._buffer.numel())
                self.device.order(self.device.current_stream(), self.copier.stream)

    def quiesce(self) -> None:
        """Drops what was fetched ahead and reclaims every lease; afterwards device memory may be freed by the
        calling thread."""
        with self._lock:
            self._quiesce()

    def _quiesce(self) -> None:
        self._follow()
        self._drop_ahead()
        for transfer in list(self._leased):
            self._give_back(transfer)
        self._mark_read()
        self.copier.drain()
        # Nothing is held on to of models that may not run again.
        for transfer in self._ring.readers():
            transfer.done.wait(self.copier.stream)
            transfer.read_by = None
        self.device.order(self.copier.stream, self.device.current_stream())
        # Nobody has a slot now; one that was taken when Ctrl-C came would never be given back.
        self._ring = Ring(self._ring.capacity_bytes)
        self._views.clear()
        self._waiting = None, 0
        self._retired.clear()
        self.timeline.forget()

    def follow(self) -> None:
        """For a layer that is used outside of any step: it runs after what has computed here before."""
        with self._lock:
            self._follow()

    def _follow(self) -> None:
        """What the calling thread issues from now on runs after what has computed here before: scratch and
        residents know no streams."""
        stream = self.device.current_stream()
        if self._computed_on is not None and not _same(self._computed_on, stream):
            self.device.order(self._computed_on, stream)
        self._computed_on = stream

    def idle(self, besides: Collection[Layer] = ()) -> bool:
        """Whether `quiesce` would disturb nobody now: it is called from nowhere inside, and no layer is
        leased but, perhaps, `besides`."""
        return not self._lock.locked() and all(transfer.layer in besides for transfer in [*self._leased])

    def expect(self, root: Hashable, layers: Sequence[Layer]) -> None:
        """The model `root` runs through these layers, resident and swapped ones, in about this order. Only
        between steps."""
        self.order.expect(root, [layer for layer in layers if layer.resident is None])
        self._uploads.expect(root, layers)

    def forget(self, root: Hashable) -> None:
        """The model `root` is on the device no more."""
        self.order.forget(root)
        self._uploads.forget(root)

    def upload(self, layers: Sequence[Layer]) -> None:
        """Makes `layers` resident. Their copies begin with the first step of their model, each in its turn
        among the swapped layers, unless `begin_uploads` comes before; compute is ordered after each at its
        layer's first use.

        Raises:
            torch.OutOfMemoryError: the device has no room for them.
        """
        for layer in layers:
            with torch.inference_mode(False):
                target = torch.empty(layer.payload_bytes, dtype=torch.uint8, device=self.device.device)
            layer.resident = target
            layer.lease = ResidentLease(layer.part_views(target))
            layer.resident_ready = Transfer(layer, target, layer.lease.parts, uploads=True)
        if layers:  # Work on memory that was freed for them may still be under way.
            self._follow()
            self.device.order(self.device.current_stream(), self.copier.stream)

    def begin_uploads(self, layers: Iterable[Layer]) -> None:
        """Begins the copies of those of `layers` that have been made resident and still wait for theirs."""
        for layer in layers:
            if is_waiting(layer):
                self.copier.submit(layer.resident_ready)

    def evict(self, layers: Sequence[Layer]) -> None:
        """Drops the permanent copies of `layers`; nothing is moved. Only between steps."""
        self._follow()
        begun = [layer for layer in layers if layer.resident_ready is not None and not is_waiting(layer)]
        if begun:
            for layer in begun:
                layer.resident_ready.cancelled = True
            self.copier.drain()
            self.device.order(self.copier.stream, self.device.current_stream())
        for layer in layers:
            layer.resident = layer.lease = layer.resident_ready = None

    # -------------------------------------------------------------------------------------------- in the step
    def begin_step(self, root: Hashable, *, wrap: bool | None, measured: Hashable = None) -> None:
        """The forward of the model `root` begins. `wrap`: whether another forward of it will follow (None:
        not known). `measured`: the work whose times are measured in it, if any."""
        with self._lock:
            self._follow()
            for transfer in list(self._leased):  # Abandoned: their forward raised.
                self._give_back(transfer)
            self._mark_read()
            holds = self.order.begin(root)
            self.wrap = self.order.repeats if wrap is None else wrap
            if not holds:
                self._drop_unexpected()
            self._uploads.begin(root)
            self.timeline.begin(root, measured)
            self._prefetch()

    def end_step(self, root: Hashable) -> list[Layer] | None:
        """The forward of the model `root` is over. Returns its layers, resident and swapped ones, in the
        order of execution, where it was measured."""
        with self._lock:
            self._mark_read()
            return self.timeline.end(root)

    def abandon_step(self, root: Hashable) -> None:
        """The forward of the model `root` raised."""
        with self._lock:
            self.timeline.abandon(root)

    def acquire(self, layer: Layer) -> AnyLease:
        """The weights of `layer`, for work issued from now on to this thread's compute stream.

        Raises:
            OSError, GGUFError: its home can no longer be read.
        """
        layer.times.uses += 1
        if layer.resident is not None:
            if layer.resident_ready is not None:
                self._await_resident(layer)
            elif self.timeline.profiling:
                self.timeline.used_at_once(layer)
            return MeasuredLease(layer, self.timeline) if self.timeline.profiling else layer.lease
        if layer in self._held:
            return self._held[layer]
        with self._lock:
            transfer = self._claim(layer)
        self._await(transfer)
        return Lease(transfer.parts, transfer, self)

    @contextlib.contextmanager
    def held(self, layer: Layer) -> Iterator[None]:
        """Inside, the weights of `layer` are there for any number of uses."""
        lease = self.acquire(layer)
        try:
            if layer.resident is None:
                self._held[layer] = ResidentLease(lease.parts)
            yield
        finally:
            self._held.pop(layer, None)
            lease.release()

    def _await_resident(self, layer: Layer) -> None:
        """The first use of a resident: its copy may be under way, or still to come."""
        if is_waiting(layer):
            with self._lock:
                self.begin_uploads([layer])
        transfer = layer.resident_ready
        self._await(transfer)
        layer.resident_ready = None
        transfer.target, transfer.parts = NO_BYTES, {}  # Who reads what the step took holds on to no memory.

    def _await(self, transfer: Transfer) -> None:
        stream, events = self.device.current_stream(), transfer.events
        events.awaited.record(stream)
        transfer.awaited = True
        if not transfer.issued:
            events.issued.wait()
        if transfer.error is not None:
            with self._lock:
                if transfer in self._leased:
                    self._give_back(transfer)
                    self._mark_read()
            if transfer.uploads:
                self.evict([transfer.layer])
            raise transfer.error
        leader = transfer.leader or transfer
        if not _same(leader.awaited_on, stream):  # Else one that came in the same copy has been waited for.
            leader.events.ready.wait(stream)
            leader.awaited_on = stream
        self.timeline.used(transfer)

    def _claim(self, layer: Layer) -> Transfer:
        if not self.order.use(layer):
            self._drop_unexpected(besides=layer)
        transfer = self._fetched(layer)
        if transfer is not None:
            self._leased[transfer] = None
            return transfer
        self.misses += 1
        self._begin_uploads_before(layer)
        transfer = self._fetch(layer)
        while transfer is None and self._ahead:  # What is used last gives way.
            self._discard(self._ahead.pop())
            transfer = self._fetch(layer)
        transfer = transfer or self._overflow(layer)
        self._leased[transfer] = None
        self._prefetch()
        return transfer

    def _fetched(self, layer: Layer) -> Transfer | None:
        """The transfer of `layer`, if it was fetched ahead: nearly always the first one."""
        if self._ahead and self._ahead[0].layer is layer:
            return self._ahead.popleft()
        for transfer in self._ahead:
            if transfer.layer is layer:
                self._ahead.remove(transfer)
                return transfer
        return None

    def _fetch(self, layer: Layer) -> Transfer | None:
        slot = self._ring.take(layer.payload_bytes)
        if slot is None:
            return None
        self._mark_read()
        transfer = Transfer(layer, *self._in_slot(slot, layer), slot, self._ring.wait_for(slot))
        self.copier.submit(transfer)
        return transfer

    def _together(self, first: Layer, wrap: bool) -> list[Layer]:
        """The layers that are fetched by one copy, from `first` on, which is small and comes next."""
        together = [first]
        small = self._small_bytes
        if self.copier.staged or not first.home.page_locked:
            return together
        room = min(self._together_bytes, self.ring_bytes // TOGETHER_RING_SHARE) - first.payload_bytes
        while True:
            layer = self.order.ahead(len(self._ahead) + len(together), wrap=wrap)
            if layer is None or layer.resident is not None or layer.payload_bytes >= small:
                return together
            room -= layer.payload_bytes
            if room < 0 or layer in together or not layer.home.follows(together[-1].home):
                return together
            together.append(layer)

    def _fetch_together(self, layers: list[Layer]) -> bool:
        """Fetches `layers` ahead; not before there is room for all of them. Returns whether there was."""
        slots: list[Slot] = []
        for layer in layers:
            slot = self._ring.take(layer.payload_bytes)
            if slot is None:
                for taken in reversed(slots):
                    self._ring.discard(taken)
                return False
            slots.append(slot)
        self._mark_read()
        transfers: list[Transfer] = []
        for slot, layer in zip(slots, layers, strict=True):
            if transfers and slot.offset == 0:  # The ring begins anew.
                self.copier.submit(transfers[0], transfers[1:])
                transfers = []
            self._begin_uploads_before(layer)
            transfer = Transfer(layer, *self._in_slot(slot, layer), slot, self._ring.wait_for(slot))
            transfers.append(transfer)
            self._ahead.append(transfer)
        self.copier.submit(transfers[0], transfers[1:])
        return True

    def _begin_uploads_before(self, swapped: Layer | None) -> None:
        if self._uploads.are_left:
            self.begin_uploads(self._uploads.before(swapped))

    def _in_slot(self, slot: Slot, layer: Layer) -> Views:
        """In a steady cycle a layer comes to the same few slots again and again."""
        key = (slot.offset, layer)
        views = self._views.get(key)
        if views is None:
            if len(self._views) >= KEPT_VIEWS:
                self._views.clear()
            assert self._buffer is not None
            target = self._buffer[slot.offset : slot.offset + layer.payload_bytes]
            views = self._views[key] = target, layer.part_views(target)
        return views

    def _overflow(self, layer: Layer) -> Transfer:
        """Serves a layer although every slot is leased (leases nested deeper than the ring is long)."""
        self.overflows += 1
        with torch.inference_mode(False):
            target = torch.empty(layer.payload_bytes, dtype=torch.uint8, device=self.device.device)
        self.device.order(self.device.current_stream(), self.copier.stream)
        transfer = Transfer(layer, target, layer.part_views(target))
        self.copier.submit(transfer)
        return transfer

    def _prefetch(self) -> bool:
        """Fetches what comes next. Returns whether there is more, which only waits for room in the ring."""
        while True:
            wrap = False
            layer = self.order.ahead(len(self._ahead), wrap=False)
            if layer is None and self.wrap:  # The rest belongs to the next forward.
                self._begin_uploads_before(None)
                wrap = True
                layer = self.order.ahead(len(self._ahead), wrap=True)
            if layer is None or layer.resident is not None:
                self._begin_uploads_before(None)
                return False
            self._begin_uploads_before(layer)
            room = self._ring.room_bytes
            if room < layer.payload_bytes or (self._waiting[0] is layer and room < self._waiting[1]):
                return True
            if layer.payload_bytes < self._small_bytes:
                together = self._together(layer, wrap)
                if len(together) > 1:
                    nbytes = sum(one.payload_bytes for one in together)
                    if room < nbytes or not self._fetch_together(together):
                        self._waiting = layer, nbytes
                        return True
                    continue
            transfer = self._fetch(layer)
            if transfer is None:
                return True
            self._ahead.append(transfer)

    def _drop_ahead(self) -> None:
        while self._ahead:
            self._discard(self._ahead.pop())

    def _drop_unexpected(self, besides: Layer | None = None) -> None:
        """Of what was fetched ahead, only what is expected next, in that order, stays, and `besides`."""
        kept: list[Transfer] = []
        expected = 0
        for transfer in self._ahead:
            if transfer.layer is self.order.ahead(expected, wrap=self.wrap):
                expected += 1
                kept.append(transfer)
            elif transfer.layer is besides:
                kept.append(transfer)
        for transfer in reversed(self._ahead):
            if transfer not in kept:
                self._discard(transfer)
        self._ahead = deque(kept)

    def _discard(self, transfer: Transfer) -> None:
        transfer.cancelled = True
        assert transfer.slot is not None
        self._ring.discard(transfer.slot)

    def release(self, transfer: Transfer) -> None:
        """What reads `transfer`'s target is enqueued; what that makes room for is fetched."""
        with self._lock:
            if transfer in self._leased:
                self._give_back(transfer)
                # What waits for more room than this waits for later layers, too.
                if not self._prefetch():
                    self._mark_read()

    def _give_back(self, transfer: Transfer) -> None:
        del self._leased[transfer]
        stream = self.device.current_stream()
        if not _same(stream, self._unmarked_on):
            self._mark_read()
            self._unmarked_on = stream
        self._unmarked.append(transfer)
        self.timeline.read(transfer.layer)
        if transfer.error is None:
            self._retired.append(transfer)
        slot, transfer.slot = transfer.slot, None
        if slot is not None:
            self._ring.release(slot, transfer)
        else:
            # Outside the budget: kept by nobody who only wants to know about it.
            transfer.target, transfer.parts = NO_BYTES, {}

    def _mark_read(self) -> None:
        """Records the event behind what reads the transfers given back so far: one for all of them, since
        whatever is written over the first waits for the last as well."""
        if self._unmarked:
            last = self._unmarked.pop()
            last.events.done.record(self._unmarked_on)
            for transfer in self._unmarked:
                transfer.read_by = last
            self._unmarked.clear()

    # ------------------------------------------------------------------------------------------- for the page
    def states(self) -> dict[Layer, str]:
        """What layers are in the ring, by events that have happened: "fetching", "ready" or "in_use". Any
        thread may ask."""
        # In the order in which compute comes to them; the host may be far ahead of it.
        coming = deque([*self._retired.copy(), *self._leased.copy()])
        computing = None
        while coming and coming[0].awaited and coming[0].events.awaited.query() and coming[0].arrived:
            computing = coming.popleft()
        coming += self._ahead.copy()
        states: dict[Layer, str] = {}
        for transfer in reversed(coming):
            if transfer.arrived:
                states[transfer.layer] = "ready"
            elif transfer.begun:
                states[transfer.layer] = "fetching"
        if computing is not None and not self.timeline.is_over:
            states[computing.layer] = "in_use"
        return states


def _same(one: Any, other: Any) -> bool:
    """Whether two streams are the same: some torch modules have another object for one each time."""
    return one is other or bool(one == other)

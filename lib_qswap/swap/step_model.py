"""How long a denoising step takes when some layers' weights are fetched for each use: an exact model of the
streamer.

Swapped layers pass through a ring of bytes, first in, first out, each in one contiguous slot. Copies share
one link and are issued in execution order, each as soon as its slot's bytes are free; a slot is free when
its layer has read it: a packed weight is unpacked first, and the rest of its layer's compute needs it no
more. Layers compute one after the other, a swapped one not before its copy has
arrived. The end of a step fetches the start of the next. Host time and the contention of copies with compute
are not modelled.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

# Steps until a model that is started cold repeats itself, and the steps that are then averaged: where the
# ring wraps differs from step to step.
WARM_UP_STEPS = 2
AVERAGED_STEPS = 6


class LayerCost(NamedTuple):
    """One layer of a model: the bytes that its weights take on the device, the seconds that it computes, and
    how many of these it takes until the bytes have been read (None: all)."""

    name: str
    nbytes: int
    compute_s: float
    read_s: float | None = None


class Fetch(NamedTuple):
    """What one swapped layer's copy and compute waited for in the last simulated step, in seconds."""

    layer: int
    """its place in execution order"""
    stall_s: float
    """compute waited for the copy"""
    blocked_s: float
    """the link waited for the slot"""


class Streaming:
    """The step model for one order of layers and one link; `step_s` is called with many sets and rings."""

    def __init__(self, layers: Sequence[LayerCost], link_bytes_per_s: float) -> None:
        if link_bytes_per_s <= 0:
            raise ValueError(f"the link's bandwidth must be above zero, not {link_bytes_per_s} bytes/s")
        self.nbytes = [layer.nbytes for layer in layers]
        self.compute_s = [layer.compute_s for layer in layers]
        self.read_s = [layer.compute_s if layer.read_s is None else layer.read_s for layer in layers]
        self.link_bytes_per_s = link_bytes_per_s
        self.total_compute_s = sum(self.compute_s)

    def bound_s(self, swapped: Sequence[bool]) -> float:
        """No step is shorter: all compute, or all swapped bytes over the link."""
        moved = sum(size for size, fetched in zip(self.nbytes, swapped, strict=True) if fetched)
        return max(self.total_compute_s, moved / self.link_bytes_per_s)

    def least_s(self, budget_bytes: int) -> float:
        """No step is shorter with `budget_bytes` for residents and ring together, whatever is in them.

        When compute comes to a stretch of layers, no more than the budget can be on the device; what is
        missing of the stretch comes over the link while it computes, and the other layers compute before or
        after that. The stretch for which this takes longest may reach over the end of a step.
        """
        surplus = [
            size / self.link_bytes_per_s - computing
            for size, computing in zip(self.nbytes, self.compute_s, strict=True)
        ]
        most = least = most_here = least_here = 0.0
        for value in surplus:
            most_here, least_here = max(0.0, most_here + value), min(0.0, least_here + value)
            most, least = max(most, most_here), min(least, least_here)
        # What is left out of a stretch over the end is a stretch itself.
        longest = max(most, sum(surplus) - least)
        return self.total_compute_s + max(0.0, longest - budget_bytes / self.link_bytes_per_s)

    def step_s(
        self,
        swapped: Sequence[bool],
        ring_bytes: int,
        averaged_steps: int = AVERAGED_STEPS,
        limit_s: float = math.inf,
    ) -> float:
        """Seconds of a step once the ring has filled. Every swapped layer must fit into the ring.

        A step longer than `limit_s` may be answered with less than it takes, though more than that.
        """
        return self._run(swapped, ring_bytes, averaged_steps, limit_s, None)

    def fetches(self, swapped: Sequence[bool], ring_bytes: int) -> list[Fetch]:
        """Where compute waits for the link and the link for compute."""
        waits: list[Fetch] = []
        self._run(swapped, ring_bytes, 1, math.inf, waits)
        return waits

    def _run(
        self,
        swapped: Sequence[bool],
        ring_bytes: int,
        averaged_steps: int,
        limit_s: float,
        waits: list[Fetch] | None,
    ) -> float:
        order, before_s, after_s = self._gaps(swapped)
        if not order:
            return self.total_compute_s
        sizes = [self.nbytes[i] for i in order]
        if max(sizes) > ring_bytes:
            raise ValueError(f"a layer of {max(sizes)} bytes does not fit into a ring of {ring_bytes} bytes")
        copy_s = [size / self.link_bytes_per_s for size in sizes]
        compute_s, read_s = [self.compute_s[i] for i in order], [self.read_s[i] for i in order]
        uses = list(zip(sizes, copy_s, before_s, compute_s, read_s, order, strict=True))
        # Rounding errors are not to decide between plans that keep one engine busy all the time.
        bound_s = max(self.total_compute_s, sum(copy_s))
        if bound_s > limit_s:
            return bound_s
        # What was fetched before the averaged steps began may be missing from them, up to a ring's worth.
        ahead_s = ring_bytes / self.link_bytes_per_s

        freed: list[float] = []  # when each slot issued so far was free again
        starts: list[int] = []  # addresses that grow forever; the ring's are these modulo its size
        address = 0
        left = ring_bytes  # of the ring, up to its end
        oldest = 0  # the first slot that the next one need not wait for
        oldest_start = 0
        copied = computed = slot_free = warm_end = 0.0
        for step in range(-WARM_UP_STEPS, averaged_steps):
            if step == 0:
                warm_end = computed
            elif step > 0 and computed - warm_end + (averaged_steps - step) * bound_s - ahead_s > (
                limit_s * averaged_steps
            ):
                return (computed - warm_end + (averaged_steps - step) * bound_s - ahead_s) / averaged_steps
            for size, copying, before, computing, reading, i in uses:
                if size > left:  # contiguous: what is left at the end of the ring is skipped
                    address += left
                    left = ring_bytes
                starts.append(address)
                address += size
                left -= size
                if oldest_start < address - ring_bytes:
                    while starts[oldest] < address - ring_bytes:
                        oldest += 1
                    oldest_start = starts[oldest]
                    slot_free = freed[oldest - 1]  # slots are freed in order: the latest counts
                computed += before
                if waits is not None and step == averaged_steps - 1:
                    arrives = max(copied, slot_free) + copying
                    waits.append(Fetch(i, max(0.0, arrives - computed), max(0.0, slot_free - copied)))
                if slot_free > copied:
                    copied = slot_free
                copied += copying
                if copied > computed:
                    computed = copied
                freed.append(computed + reading)
                computed += computing
            computed += after_s
        mean_s = (computed - warm_end) / averaged_steps
        return mean_s if mean_s > bound_s * (1 + 1e-9) else bound_s

    def _gaps(self, swapped: Sequence[bool]) -> tuple[list[int], list[float], float]:
        """Swapped layers, the compute of residents before each of them, and after the last of them."""
        order: list[int] = []
        before: list[float] = []
        gap = 0.0
        for i, fetched in enumerate(swapped):
            if fetched:
                order.append(i)
                before.append(gap)
                gap = 0.0
            else:
                gap += self.compute_s[i]
        return order, before, gap


def _streaming(
    layers: Sequence[LayerCost], resident: Collection[str], link_bytes_per_s: float
) -> tuple[Streaming, list[bool]]:
    kept = frozenset(resident)
    return Streaming(layers, link_bytes_per_s), [layer.name not in kept for layer in layers]


def predict_step(
    layers: Sequence[LayerCost], resident: Collection[str], *, ring_bytes: int, link_bytes_per_s: float
) -> float:
    """Seconds of a step in the steady state; never below `bound_step`.

    `layers` in execution order, `resident` the names of those with a permanent copy. Raises ValueError where
    a swapped layer is larger than the ring or the bandwidth is not positive.
    """
    streaming, swapped = _streaming(layers, resident, link_bytes_per_s)
    return streaming.step_s(swapped, ring_bytes)


def least_step(layers: Sequence[LayerCost], *, budget_bytes: int, link_bytes_per_s: float) -> float:
    """Seconds that no step can be shorter than with `budget_bytes` for residents and ring: at least compute,
    and more where some stretch of layers has more bytes than the link brings in its time."""
    return Streaming(layers, link_bytes_per_s).least_s(budget_bytes)


def bound_step(layers: Sequence[LayerCost], resident: Collection[str], *, link_bytes_per_s: float) -> float:
    """Seconds that no step can be shorter than: max(compute, swapped bytes / link)."""
    streaming, swapped = _streaming(layers, resident, link_bytes_per_s)
    return streaming.bound_s(swapped)

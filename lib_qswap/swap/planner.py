"""Which layers stay on the device, and how large the ring is that the others pass through.

A copy engine and a compute engine that run side by side are both busy all the time if the bytes that compute
has asked for by time t stay within the ring of the straight line through (compute time of a step, swapped
bytes of a step): above it by more, compute waits for the link; below it by more, the link waits for a free
slot. So residents are spread by error diffusion over compute time. What that leaves over (layers are lumps,
and the ring's end cuts slots off) is decided by the step model: several rings and a few hundred exchanges of
layers are tried, and the best predicted step is kept.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .step_model import Fetch, LayerCost, Streaming, bound_step, predict_step

__all__ = ["LayerCost", "Plan", "bound_step", "make_plan", "predict_step", "spread"]

TINY_LAYER_BYTES = 1_000_000

# Rings that are tried, in largest swapped layers; 3.5 to 4 is where a larger one stops to pay for most
# models.
RING_SIZES = (4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 6.0)

# Layer sizes above which nothing is swapped, tried from the largest down: with a budget near the model's
# size, a ring for small layers leaves more room than it costs.
SIZE_LIMITS_TRIED = 6

# The exchanges that are tried cost about this many simulated layers (a microsecond each), whatever the
# model's length.
SEARCH_EFFORT = 90_000
EXCHANGES_MOST, EXCHANGES_LEAST = 400, 60
GOOD_ENOUGH = 1.0005  # of the bound
SEARCH_STEPS = 2
BISECTIONS = 16


class Plan(NamedTuple):
    """Names of the resident layers in execution order, the ring, and what a step takes with them."""

    resident: tuple[str, ...]
    ring_bytes: int
    step_s: float
    bound_s: float
    budget_bytes: int
    message: str | None


def spread(weights: Sequence[float], share: float) -> list[bool]:
    """Chooses items so that, at every point of the order, what is chosen weighs about `share` of what has
    passed.

    Error diffusion: the error is at most half of the largest weight. Raises ValueError for a share outside
    0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share is between 0 and 1, not {share}")
    chosen = []
    owed = 0.0
    for weight in weights:
        owed += weight * share
        take = owed > 0 and owed >= weight / 2
        chosen.append(take)
        if take:
            owed -= weight
    return chosen


def make_plan(
    layers: Sequence[LayerCost], *, budget_bytes: int, link_bytes_per_s: float, ring_bytes: int | None = None
) -> Plan:
    """The plan with the shortest predicted step found for a budget of device bytes, which the ring is part
    of.

    `layers` in execution order, with distinct names. `ring_bytes` fixes the ring instead of trying several.
    Where everything fits, all layers are resident and there is no ring. A budget below one largest layer is
    raised to it, and a ring that no layer passes through, or larger than the budget, is changed: `message`
    says so. Deterministic. Raises ValueError for layers of the same name, negative sizes or times, or a
    bandwidth that is not positive.
    """
    _check(layers)
    streaming = Streaming([x.nbytes for x in layers], [x.compute_s for x in layers], link_bytes_per_s)
    largest = max(streaming.nbytes, default=0)
    messages = []
    if budget_bytes < largest and budget_bytes < sum(streaming.nbytes):
        messages.append(
            f"The GPU budget of {budget_bytes / 1e6:.0f} MB is smaller than the largest layer: "
            f"{largest / 1e6:.0f} MB are used, the least that works."
        )
        budget_bytes = largest
    if sum(streaming.nbytes) <= budget_bytes:
        swapped, ring = [False] * len(layers), 0
    else:
        if ring_bytes is not None and not largest <= ring_bytes <= budget_bytes:
            allowed = min(max(ring_bytes, largest), budget_bytes)
            messages.append(
                f"A ring of {ring_bytes / 1e6:.0f} MB does not work here: {allowed / 1e6:.0f} MB are used "
                f"(at least the largest layer, at most the budget)."
            )
            ring_bytes = allowed
        swapped, ring = _Planner(streaming, budget_bytes, ring_bytes).plan()
    return Plan(
        resident=tuple(x.name for x, fetched in zip(layers, swapped, strict=True) if not fetched),
        ring_bytes=ring,
        step_s=streaming.step_s(swapped, ring),
        bound_s=streaming.bound_s(swapped),
        budget_bytes=budget_bytes,
        message=" ".join(messages) or None,
    )


def _check(layers: Sequence[LayerCost]) -> None:
    if len({layer.name for layer in layers}) < len(layers):
        raise ValueError("two layers have the same name")
    for layer in layers:
        if layer.nbytes < 0 or layer.compute_s < 0:
            raise ValueError(f"layer {layer.name} has a negative size or time")


class _Candidate(NamedTuple):
    step_s: float
    ring_bytes: int
    swapped: list[bool]


class _Planner:
    """The search for one budget that not everything fits into."""

    def __init__(self, streaming: Streaming, budget_bytes: int, ring_bytes: int | None) -> None:
        self.streaming = streaming
        self.nbytes = streaming.nbytes
        self.budget_bytes = budget_bytes
        self.fixed_ring_bytes = ring_bytes
        self.total_bytes = sum(streaming.nbytes)
        self.random = random.Random(0)

    def plan(self) -> tuple[list[bool], int]:
        """Which layers are swapped, and the ring's bytes."""
        best = min(self._candidates(), key=lambda candidate: candidate.step_s)
        best = self._exchange(best)
        return best.swapped, best.ring_bytes

    def _candidates(self) -> Iterator[_Candidate]:
        """Error diffusion for several rings, leaving out those that cannot be faster than what was found."""
        best_s = math.inf
        for limit in self._size_limits():
            for multiple in RING_SIZES:
                ring = self.fixed_ring_bytes or math.ceil(limit * multiple)
                room = self.budget_bytes - ring
                must_move = self.total_bytes - room
                possible_s = max(self.streaming.total_compute_s, must_move / self.streaming.link_bytes_per_s)
                if room < 0 or ring < limit or possible_s >= best_s:
                    continue
                for keep_idle in (False, True):
                    swapped = self._diffuse(limit, room, keep_idle)
                    if swapped is not None:
                        step_s = self.streaming.step_s(swapped, ring, SEARCH_STEPS)
                        best_s = min(best_s, step_s)
                        yield _Candidate(step_s, ring, swapped)
                if self.fixed_ring_bytes:
                    break

    def _size_limits(self) -> list[int]:
        sizes = sorted({size for size in self.nbytes if size > 0}, reverse=True)
        return sizes[:: math.ceil(len(sizes) / SIZE_LIMITS_TRIED)]

    def _diffuse(self, limit: int, room: int, keep_idle: bool) -> list[bool] | None:
        """Which layers are swapped if residents may take `room` bytes; None where it is too little.

        Resident first: layers above the size limit, then tiny ones, then (`keep_idle`) those that move bytes
        for no compute time to move them in.
        """
        nbytes, compute_s = self.nbytes, self.streaming.compute_s
        kept = [size > limit or size == 0 for size in nbytes]
        room -= sum(size for size, keep in zip(nbytes, kept, strict=True) if keep)
        if room < 0:
            return None
        tiny = (i for i, size in enumerate(nbytes) if not kept[i] and size < TINY_LAYER_BYTES)
        for i in sorted(tiny, key=nbytes.__getitem__):
            if nbytes[i] <= room:
                kept[i] = True
                room -= nbytes[i]
        if keep_idle:
            first = [i for i, keep in enumerate(kept) if not keep and compute_s[i] == 0]
            if not first or sum(nbytes[i] for i in first) > room:
                return None
            for i in first:
                kept[i] = True
                room -= nbytes[i]
        return self._track_line(kept, room)

    def _track_line(self, kept: list[bool], room: int) -> list[bool]:
        """Swapped layers, besides those kept, whose bytes follow a straight line over compute time.

        The line's slope is the smallest whose residents fit into `room`; it is found by bisection.
        """
        nbytes = self.nbytes
        free = [i for i, keep in enumerate(kept) if not keep]
        free_bytes = sum(nbytes[i] for i in free)
        # A trace of bytes in the time orders layers that do not compute, and models whose times are not
        # known yet.
        trace = (1e-6 * self.streaming.total_compute_s or 1.0) / max(free_bytes, 1)
        passed = 0.0
        times = []  # of compute up to the layer's own start
        for i, keep in enumerate(kept):
            if not keep:
                times.append(passed + trace * nbytes[i] / 2)
            passed += self.streaming.compute_s[i] + (0.0 if keep else trace * nbytes[i])

        def fetched_at(slope: float) -> tuple[list[int], int]:
            fetched, moved = [], 0
            for i, time_s in zip(free, times, strict=True):
                if slope * time_s >= moved + nbytes[i] / 2:
                    fetched.append(i)
                    moved += nbytes[i]
            return fetched, moved

        least = free_bytes - room
        fetched = free
        low, high = 0.0, 4 * free_bytes / passed
        for _ in range(BISECTIONS):
            slope = (low + high) / 2
            tried, moved = fetched_at(slope)
            if moved >= least:
                fetched, high = tried, slope
            else:
                low = slope
        swapped = [False] * len(nbytes)
        for i in fetched:
            swapped[i] = True
        left = room - (free_bytes - sum(nbytes[i] for i in fetched))
        for i in sorted(fetched, key=nbytes.__getitem__, reverse=True):
            if nbytes[i] <= left:
                swapped[i] = False
                left -= nbytes[i]
        return swapped

    def _exchange(self, best: _Candidate) -> _Candidate:
        """Exchanges a swapped layer where compute waits for a resident one where the link waits, while that
        helps."""
        count = min(max(SEARCH_EFFORT // max(len(self.nbytes), 1), EXCHANGES_LEAST), EXCHANGES_MOST)
        streaming, ring = self.streaming, best.ring_bytes
        bound = streaming.bound_s(best.swapped)
        fetches: list[Fetch] = []
        for _ in range(count):
            if best.step_s <= bound * GOOD_ENOUGH:
                break
            if not fetches:
                fetches = streaming.fetches(best.swapped, ring)
            tried = self._exchanged(best, fetches)
            if tried is None:
                continue
            step_s = streaming.step_s(tried, ring, SEARCH_STEPS)
            if step_s < best.step_s:
                best, fetches = _Candidate(step_s, ring, tried), []
                bound = streaming.bound_s(tried)
        return best

    def _exchanged(self, best: _Candidate, fetches: list[Fetch]) -> list[bool] | None:
        """One random exchange, likelier where the waits are; None where it breaks the budget."""
        pick = self.random
        stalled = pick.choices(range(len(fetches)), [f.stall_s + 1e-9 for f in fetches])[0]
        blocked = pick.choices(range(len(fetches)), [f.blocked_s + 1e-9 for f in fetches])[0]
        relieved = fetches[(stalled - pick.randrange(5)) % len(fetches)].index
        near = fetches[(blocked - pick.randrange(5)) % len(fetches)].index
        added = None
        for distance in range(1, len(best.swapped)):
            i = (near - distance) % len(best.swapped)
            if not best.swapped[i] and 0 < self.nbytes[i] <= best.ring_bytes and pick.random() < 0.4:
                added = i
                break
        swapped = list(best.swapped)
        swapped[relieved] = False
        if added is not None:
            swapped[added] = True
        resident = sum(size for size, fetched in zip(self.nbytes, swapped, strict=True) if not fetched)
        return swapped if resident + best.ring_bytes <= self.budget_bytes else None

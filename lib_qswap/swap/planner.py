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
TINY_SHARE = 0.5  # of the room for residents, at most

# Rings that are tried, in largest swapped layers. Past 3.5 to 4 a larger one seldom pays; much larger ones
# help where a small budget leaves a long stretch of a model short of bandwidth.
RING_SIZES = (4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 6.0, 9.0, 14.0, 20.0)

# Layer sizes above which nothing is swapped, tried from the largest down: with a budget near the model's
# size, a ring for small layers leaves more room than it costs.
SIZE_LIMITS_TRIED = 6

# Changes that are tried: as many as make this number of simulated layers, within the limits below; one takes
# about 3 microseconds for each layer of the model.
SEARCH_EFFORT = 12_000
EXCHANGES_LEAST, EXCHANGES_MOST = 30, 2000
GOOD_ENOUGH = 1.0005  # of what no plan for the budget can be below
HEAT = 0.001  # how much slower than the current set one may be, at first
REACH = 5  # how many fetches before a wait the cause is looked for
SEARCH_STEPS = 2
BISECTIONS = 12


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
        take = share > 0 and owed >= weight / 2
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


def _step_s(candidate: _Candidate) -> float:
    return candidate.step_s


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
        best = self._improve(min(self._candidates(), key=_step_s))
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
                for keep_idle in (True, False):
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
        tiny = [i for i, keep in enumerate(kept) if not keep and nbytes[i] < TINY_LAYER_BYTES]
        # Where tiny layers are most of the model they are spread as any others.
        if sum(nbytes[i] for i in tiny) <= room * TINY_SHARE:
            room -= self._keep(tiny, kept)
        if keep_idle:
            idle = [i for i, keep in enumerate(kept) if not keep and compute_s[i] == 0]
            if not idle or sum(nbytes[i] for i in idle) > room:
                return None
            room -= self._keep(idle, kept)
        return self._track_line(kept, room)

    def _keep(self, layers: list[int], kept: list[bool]) -> int:
        for i in layers:
            kept[i] = True
        return sum(self.nbytes[i] for i in layers)

    def _track_line(self, kept: list[bool], room: int) -> list[bool]:
        """Swapped layers, besides those kept, whose bytes follow a straight line over compute time.

        The line's slope is the smallest whose residents fit into `room`; it is found by bisection.
        """
        nbytes = self.nbytes
        free = [i for i, keep in enumerate(kept) if not keep]
        free_bytes = sum(nbytes[i] for i in free)
        # A trace of bytes in the time orders layers that do not compute, and models of unknown times.
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

    def _improve(self, best: _Candidate) -> _Candidate:
        """Exchanges swapped layers near where compute waits for residents near where the link waits.

        Threshold accepting: early on, a slightly slower set may become the current one, to leave dead ends.
        """
        count = min(max(SEARCH_EFFORT // max(len(self.nbytes), 1), EXCHANGES_LEAST), EXCHANGES_MOST)
        current = best
        must_move = self.total_bytes - self.budget_bytes
        least_s = max(self.streaming.total_compute_s, must_move / self.streaming.link_bytes_per_s)
        fetches: list[Fetch] = []
        for tries_left in range(count, 0, -1):
            if best.step_s <= least_s * GOOD_ENOUGH:
                break
            if not fetches:
                fetches = self.streaming.fetches(current.swapped, current.ring_bytes)
            tried = self._neighbour(current.swapped, fetches)
            if tried is None:
                continue
            threshold = current.step_s * (1 + HEAT * tries_left / count)
            if tried.step_s <= threshold:
                current, fetches = tried, []
                best = min(best, current, key=_step_s)
        return best

    def _neighbour(self, swapped: list[bool], fetches: list[Fetch]) -> _Candidate | None:
        """A random change of what is swapped, likelier where the waits are; None if it breaks the budget."""
        pick = self.random
        swapped = list(swapped)
        kind = pick.random()
        if kind < 0.8:
            k = pick.choices(range(len(fetches)), [fetch.stall_s + 1e-9 for fetch in fetches])[0]
            swapped[fetches[(k - pick.randrange(REACH)) % len(fetches)].layer] = False
        if kind > 0.1:
            k = pick.choices(range(len(fetches)), [fetch.blocked_s + 1e-9 for fetch in fetches])[0]
            i = fetches[(k - pick.randrange(REACH)) % len(fetches)].layer
            for _ in swapped:
                i -= 1  # backwards in the cycle: a negative index counts from the end
                if not swapped[i] and self.nbytes[i] and pick.random() < 0.4:
                    swapped[i] = True
                    break
        return self._candidate(swapped)

    def _candidate(self, swapped: list[bool]) -> _Candidate | None:
        """These layers swapped, the ring what residents leave of the budget; None where it is too little."""
        resident = sum(size for size, fetched in zip(self.nbytes, swapped, strict=True) if not fetched)
        largest = max((size * fetched for size, fetched in zip(self.nbytes, swapped, strict=True)), default=0)
        ring = self.fixed_ring_bytes or self.budget_bytes - resident
        if not largest or ring < largest or resident + ring > self.budget_bytes:
            return None
        return _Candidate(self.streaming.step_s(swapped, ring, SEARCH_STEPS), ring, swapped)

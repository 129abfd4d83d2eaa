"""Residents by error diffusion over compute time: swapped bytes that follow a straight line, as far as a ring
can make up for where they do not.

The line is a rate of bytes that every second of compute adds to what is owed, and every swapped layer takes
off it. What is owed never exceeds `reach_bytes`: a stretch of a model with much compute and few bytes leaves
the link idle once the ring is full, and that time is lost; layers after it cannot make up for it by coming
closer together than the ring has room for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

TINY_LAYER_BYTES = 1_000_000
TINY_SHARE = 0.5  # of the room for residents, at most
BISECTIONS = 10


class Recipe(NamedTuple):
    """How residents are chosen for a ring.

    Attributes:
        limit_bytes: larger layers are resident.
        ring_bytes: of the budget, residents get the rest.
        tiny_first: layers that are not worth a copy are resident before any other.
        idle_first: so are those that move bytes for no compute time to move them in.
        reach: how far the line reaches back, in rings.
        threshold: a layer is swapped where this share of its bytes is owed.
        phase: what is owed as a step begins, in bytes of the limit; None: what the step before left over.
    """

    limit_bytes: int
    ring_bytes: int
    tiny_first: bool = True
    idle_first: bool = True
    reach: float = 1.0
    threshold: float = 0.5
    phase: float | None = None


class Diffusion:
    """The layers of one model, in execution order."""

    def __init__(self, nbytes: Sequence[int], compute_s: Sequence[float]) -> None:
        self.nbytes = nbytes
        self.compute_s = compute_s
        self.total_bytes = sum(nbytes)
        self._total_s = sum(compute_s)

    def swapped(self, recipe: Recipe, budget_bytes: int) -> list[bool] | None:
        """Which layers are swapped; None where the recipe does not fit into the budget."""
        nbytes = self.nbytes
        room = budget_bytes - recipe.ring_bytes
        kept = [size > recipe.limit_bytes or size == 0 for size in nbytes]
        room -= sum(size for size, keep in zip(nbytes, kept, strict=True) if keep)
        if room < 0:
            return None
        if recipe.tiny_first:
            # Where tiny layers are most of the model they are spread as any others.
            room = self._keep(kept, [size < TINY_LAYER_BYTES for size in nbytes], room, room * TINY_SHARE)
        if recipe.idle_first:
            room = self._keep(kept, [seconds == 0 for seconds in self.compute_s], room, room)
        return self._follow_line(kept, room, recipe)

    def _keep(self, kept: list[bool], wanted: list[bool], room: int, most: float) -> int:
        """Marks `wanted` layers as kept if they take no more than `most`; returns the room that is left."""
        more = [i for i, keep in enumerate(wanted) if keep and not kept[i]]
        taken = sum(self.nbytes[i] for i in more)
        if taken > most:
            return room
        for i in more:
            kept[i] = True
        return room - taken

    def _follow_line(self, kept: list[bool], room: int, recipe: Recipe) -> list[bool]:
        """The smallest rate whose residents, with those kept, fit into `room` is found by bisection."""
        nbytes = self.nbytes
        free = [i for i, keep in enumerate(kept) if not keep]
        sizes = [nbytes[i] for i in free]
        free_bytes = sum(sizes)
        waits, passed = self._waits(kept, free_bytes)
        threshold = recipe.threshold
        reach_bytes = max(recipe.reach * recipe.ring_bytes, recipe.limit_bytes * threshold)
        phase_bytes = None if recipe.phase is None else recipe.phase * recipe.limit_bytes
        owed_before = 0.0  # as the last step that was tried ended

        def follow(rate: float) -> tuple[list[bool], int, float]:
            taken, moved, owed = [], 0, owed_before if phase_bytes is None else phase_bytes
            for wait, size in zip(waits, sizes, strict=True):
                owed += rate * wait
                if owed > reach_bytes:
                    owed = reach_bytes
                take = owed >= size * threshold
                taken.append(take)
                if take:
                    owed -= size
                    moved += size
            return taken, moved, owed

        least = free_bytes - room
        taken, moved = [True] * len(free), free_bytes
        low, high = 0.0, 4 * free_bytes / passed
        for _ in range(BISECTIONS):
            rate = (low + high) / 2
            tried, bytes_tried, owed_before = follow(rate)
            if bytes_tried >= least:
                taken, moved, high = tried, bytes_tried, rate
            else:
                low = rate
        swapped = [False] * len(nbytes)
        for i, take in zip(free, taken, strict=True):
            swapped[i] = take
        left = moved - least
        for i in sorted((i for i in free if swapped[i]), key=nbytes.__getitem__, reverse=True):
            if nbytes[i] <= left:
                swapped[i] = False
                left -= nbytes[i]
        return swapped

    def _waits(self, kept: list[bool], free_bytes: int) -> tuple[list[float], float]:
        """Compute time between the starts of layers that are not kept, the first one's over the step's end;
        and its sum."""
        # A trace of bytes in the time orders layers that do not compute, and models of unknown times.
        trace = (1e-6 * self._total_s or 1.0) / max(free_bytes, 1)
        waits: list[float] = []
        since = 0.0
        for size, seconds, keep in zip(self.nbytes, self.compute_s, kept, strict=True):
            if keep:
                since += seconds
            else:
                waits.append(since + trace * size)
                since = seconds
        if waits:
            waits[0] += since
        return waits, math.fsum(waits) or 1.0

"""The search for the residents of one budget: recipes for error diffusion, then exchanges of layers.

Every candidate is judged by the step model. A grid of recipes is tried, then random variations of the best;
what these lead to is then improved side by side, and what falls behind is given up. Where the link is the
limit, the smallest ring that never blocks it is the best plan; that is often one that a few layers fill to
the byte, or one that only smaller layers pass through.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable
from typing import NamedTuple

from .diffusion import Diffusion, Recipe
from .step_model import AVERAGED_STEPS, Fetch, Streaming

# Rings that are tried, in largest swapped layers. Past 3.5 to 4 a larger one seldom pays; much larger ones
# help where a small budget leaves a long stretch of a model short of bandwidth.
RING_SIZES = (4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 6.0, 9.0, 14.0, 20.0)

# Layer sizes above which nothing is swapped, tried from the largest down: with a budget near the model's
# size, a ring for small layers leaves more room than it costs.
SIZE_LIMITS_TRIED = 6

# For each ring, with and without layers first that do not compute; the line's reach in rings.
FIRST_TRIED = ((True, 1.0), (False, 0.5))
REACHES = (1.0, 0.5, math.inf)
KEPT_BY_RING, KEPT_RECIPES = 4, 3

# A few layers of the sizes that weigh most fill a ring to the byte: so many sizes, so many layers at most.
EXACT_RING_SIZES, EXACT_RING_LAYERS = 3, 4

VARIATIONS_MOST = 800
RESCALED, EXACT = 0.4, 0.3  # how often a variation changes the ring in which way

GOOD_ENOUGH = 1.0005  # of what no plan for the budget can be below
ALIKE, ROOMY = 1.001, 4.0  # steps that do not differ; a ring, in largest layers, that is large enough
SLOWER_TRIED = 1.03  # of the best so far: how much slower recipes are of interest
EXCHANGED = 0.2  # of the effort, for exchanges
HEAT = 0.001  # how much slower than the current set one may be, at first
REACH = 5  # how many fetches before a wait the cause is looked for
SEARCH_STEPS = 2  # simulated after the warm-up; the ring of a few layers wraps elsewhere in each of them
FEW_LAYERS = 64


class Candidate(NamedTuple):
    step_s: float
    ring_bytes: int
    swapped: list[bool]


def _step_s(candidate: Candidate) -> float:
    return candidate.step_s


class PlanSearch:
    """The search for one budget that not everything fits into, with a ring of any size or of `ring_bytes`."""

    def __init__(self, streaming: Streaming, budget_bytes: int, ring_bytes: int | None) -> None:
        self.streaming = streaming
        self.nbytes = streaming.nbytes
        self.budget_bytes = budget_bytes
        self.fixed_ring_bytes = ring_bytes
        self.diffusion = Diffusion(streaming.nbytes, streaming.compute_s)
        self.random = random.Random(0)
        self.limits = self._size_limits()
        self.steps = AVERAGED_STEPS if len(self.nbytes) <= FEW_LAYERS else SEARCH_STEPS
        self.enough_s = GOOD_ENOUGH * min(self._least_s(limit, limit) for limit in self.limits)
        self._tried: dict[Recipe, Candidate | None] = {}
        self._exact: dict[int, list[int]] = {}
        self._best_s = math.inf
        self._work = 0  # layers that recipes were followed through and simulated with

    def best(self, effort: int) -> Candidate:
        """The best plan found. `effort`: how many layers variations of recipes may go through; exchanges get
        a share of that on top."""
        candidates = [candidate for _, candidate in self._recipes(effort)]
        best = self._improve(candidates, int(EXCHANGED * effort) // len(self.nbytes))
        # A larger ring forgives more where times are not quite as measured.
        enough = ROOMY * max(self.nbytes)
        alike = [
            tried
            for tried in self._tried.values()
            if tried is not None and tried.step_s <= ALIKE * best.step_s and tried.ring_bytes <= enough
        ]
        return max([best, *alike], key=lambda candidate: candidate.ring_bytes)

    def _least_s(self, limit: int, ring_bytes: int) -> float:
        """What no step with such a ring is below; infinite where layers above the limit do not fit."""
        kept_bytes = sum(size for size in self.nbytes if size > limit)
        if kept_bytes > self.budget_bytes - ring_bytes or ring_bytes < limit:
            return math.inf
        must_move = self.diffusion.total_bytes - (self.budget_bytes - ring_bytes)
        return max(self.streaming.least_s(self.budget_bytes), must_move / self.streaming.link_bytes_per_s)

    def _size_limits(self) -> list[int]:
        sizes = sorted({size for size in self.nbytes if size > 0}, reverse=True)
        return sizes[:: math.ceil(len(sizes) / SIZE_LIMITS_TRIED)]

    # ------------------------------------------------------------------------------------------------ recipes
    def _recipes(self, effort: int) -> list[tuple[Recipe, Candidate]]:
        """The best recipes found, each with what it leads to, the best first."""
        rings = [
            Recipe(limit, self.fixed_ring_bytes or math.ceil(limit * multiple), True, idle_first, reach)
            for idle_first, reach in FIRST_TRIED
            for limit in self.limits
            for multiple in ((1.0,) if self.fixed_ring_bytes else RING_SIZES)
        ]
        best = self._try(rings, KEPT_BY_RING)
        best = self._try(
            [
                recipe._replace(tiny_first=tiny, idle_first=idle, reach=reach)
                for recipe, _ in best
                for tiny, idle in ((True, True), (True, False), (False, False))
                for reach in REACHES
            ],
            KEPT_RECIPES,
        )
        if self.fixed_ring_bytes is None:
            exact = [
                recipe._replace(ring_bytes=ring)
                for recipe, _ in best
                for ring in self._exact_rings(recipe.limit_bytes)
            ]
            best = self._try([*(recipe for recipe, _ in best), *exact], KEPT_RECIPES)
        return self._vary(best, effort)

    def _vary(self, best: list[tuple[Recipe, Candidate]], effort: int) -> list[tuple[Recipe, Candidate]]:
        """Random changes of the best recipes, the first ones' more often than the others'."""
        pick = self.random
        enough = self._work + effort
        for _ in range(VARIATIONS_MOST):
            if self._work >= enough or self._best_s <= self.enough_s:
                break
            recipe, _ = best[int(pick.random() ** 2 * len(best))]
            choice = pick.random()
            if self.fixed_ring_bytes is None and choice < RESCALED:
                ring = math.ceil(recipe.ring_bytes * pick.uniform(0.85, 1.1))
                recipe = recipe._replace(ring_bytes=ring)
            elif self.fixed_ring_bytes is None and choice < RESCALED + EXACT:
                recipe = recipe._replace(ring_bytes=pick.choice(self._exact_rings(recipe.limit_bytes)))
            if pick.random() < 0.3:
                recipe = recipe._replace(reach=pick.choice((*REACHES, 0.3, 0.4, 0.6, 0.8, 1.2)))
            if pick.random() < 0.5:
                recipe = recipe._replace(threshold=pick.uniform(0.1, 1))
            if pick.random() < 0.3:
                recipe = recipe._replace(phase=pick.uniform(-1, 1))
            if pick.random() < 0.1:
                recipe = recipe._replace(idle_first=not recipe.idle_first)
            best = self._try([*(known for known, _ in best), recipe], KEPT_RECIPES)
        return best

    def _exact_rings(self, limit: int) -> list[int]:
        """Rings for layers up to `limit` that a few of them fill to the byte."""
        if limit not in self._exact:
            bytes_of: dict[int, int] = {}
            for size in self.nbytes:
                if 0 < size <= limit:
                    bytes_of[size] = bytes_of.get(size, 0) + size
            sizes = sorted(bytes_of, key=bytes_of.__getitem__, reverse=True)[:EXACT_RING_SIZES]
            sums = {
                sum(chosen)
                for count in range(1, EXACT_RING_LAYERS + 1)
                for chosen in itertools.combinations_with_replacement(sizes, count)
            }
            self._exact[limit] = sorted({limit, *(ring for ring in sums if ring >= limit)})
        return self._exact[limit]

    def _try(self, recipes: Iterable[Recipe], keep: int) -> list[tuple[Recipe, Candidate]]:
        """The best of `recipes` whose residents differ, each with what it leads to."""
        found = []
        for recipe in recipes:
            if recipe not in self._tried:
                self._tried[recipe] = self._cook(recipe)
            candidate = self._tried[recipe]
            if candidate is not None:
                found.append((recipe, candidate))
        found.sort(key=lambda pair: pair[1].step_s)
        distinct: list[tuple[Recipe, Candidate]] = []
        for recipe, candidate in found:
            if all(candidate.swapped != other.swapped for _, other in distinct):
                distinct.append((recipe, candidate))
        return distinct[:keep]

    def _cook(self, recipe: Recipe) -> Candidate | None:
        """What a recipe leads to; None where that cannot be, or need not be, better than the best so far."""
        if self._best_s <= self.enough_s:
            return None
        if self._least_s(recipe.limit_bytes, recipe.ring_bytes) >= self._best_s:
            return None
        self._work += len(self.nbytes)
        swapped = self.diffusion.swapped(recipe, self.budget_bytes)
        if swapped is None:
            return None
        self._work += sum(swapped)
        step_s = self.streaming.step_s(swapped, recipe.ring_bytes, self.steps, self._best_s * SLOWER_TRIED)
        self._best_s = min(self._best_s, step_s)
        return Candidate(step_s, recipe.ring_bytes, swapped)

    # ---------------------------------------------------------------------------------------------- exchanges
    def _improve(self, candidates: list[Candidate], exchanges: int) -> Candidate:
        """Each candidate gets its share of the exchanges; the worst is given up after each round."""
        while len(candidates) > 1:
            share = exchanges // (2 * len(candidates))
            candidates = [self._exchange(candidate, share) for candidate in candidates]
            exchanges -= share * len(candidates)
            candidates = sorted(candidates, key=_step_s)[:-1]
        return self._exchange(candidates[0], exchanges)

    def _exchange(self, best: Candidate, count: int) -> Candidate:
        """Exchanges swapped layers near where compute waits for residents near where the link waits.

        Threshold accepting: early on, a slightly slower set may become the current one, to leave dead ends.
        """
        current = best
        fetches: list[Fetch] = []
        for tries_left in range(count, 0, -1):
            if best.step_s <= self.enough_s:
                break
            if not fetches:
                fetches = self.streaming.fetches(current.swapped, current.ring_bytes)
            threshold = current.step_s * (1 + HEAT * tries_left / count)
            tried = self._neighbour(current.swapped, fetches, threshold)
            if tried is not None and tried.step_s <= threshold:
                current, fetches = tried, []
                best = min(best, current, key=_step_s)
        return best

    def _neighbour(self, swapped: list[bool], fetches: list[Fetch], limit_s: float) -> Candidate | None:
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
        return self._candidate(swapped, limit_s)

    def _candidate(self, swapped: list[bool], limit_s: float) -> Candidate | None:
        """These layers swapped, the ring what residents leave of the budget; None where it is too little."""
        resident = sum(size for size, fetched in zip(self.nbytes, swapped, strict=True) if not fetched)
        largest = max((size * fetched for size, fetched in zip(self.nbytes, swapped, strict=True)), default=0)
        ring = self.fixed_ring_bytes or self.budget_bytes - resident
        if not largest or ring < largest or resident + ring > self.budget_bytes:
            return None
        return Candidate(self.streaming.step_s(swapped, ring, self.steps, limit_s), ring, swapped)

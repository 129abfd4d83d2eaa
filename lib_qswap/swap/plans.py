"""Plans that were made before: a search takes up to 0.4 s, and models that take turns on a device come back
to much the same budget each time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from lib_qswap.swap import planner
from lib_qswap.swap.planner import LayerCost, Plan

KEPT_PLANS = 8

SAME_LINK = 0.05
"""Two measurements of one link differ by less than this share."""

AT_THE_BOUND = 1.005
"""A step of no more than its bound times this cannot be had much shorter with any link."""

SAME_BUDGET = 1 / 128
"""A plan serves a larger budget, too, if what it leaves unused is less than this share of the model."""


class _Made(NamedTuple):
    layers: tuple[LayerCost, ...]
    budget_bytes: int
    link_bytes_per_s: float
    ring_bytes: int | None
    plan: Plan

    def fits(self, budget_bytes: int) -> bool:
        """Whether another plan would have nothing to gain from this budget."""
        if budget_bytes == self.budget_bytes:
            return True
        total = sum(layer.nbytes for layer in self.layers)
        if len(self.plan.resident) == len(self.layers) or budget_bytes >= total:
            return len(self.plan.resident) == len(self.layers) and budget_bytes >= total
        resident = set(self.plan.resident)
        used = sum(layer.nbytes for layer in self.layers if layer.name in resident) + self.plan.ring_bytes
        unused = budget_bytes - self.budget_bytes
        return self.plan.message is None and used <= budget_bytes and unused <= SAME_BUDGET * total


class Plans:
    """The last plans of one model."""

    def __init__(self) -> None:
        self._made: deque[_Made] = deque(maxlen=KEPT_PLANS)

    def make(
        self,
        layers: Sequence[LayerCost],
        *,
        budget_bytes: int,
        link_bytes_per_s: float,
        ring_bytes: int | None = None,
    ) -> Plan:
        """As `planner.make_plan`, or a plan made before for the same layers and times, where it serves as
        well; its times are those of this link."""
        asked = tuple(layers)
        for made in self._made:
            if (made.layers, made.ring_bytes) == (asked, ring_bytes) and made.fits(budget_bytes):
                plan = made.plan
                step_s = planner.predict_step(
                    asked, plan.resident, ring_bytes=plan.ring_bytes, link_bytes_per_s=link_bytes_per_s
                )
                bound_s = planner.bound_step(asked, plan.resident, link_bytes_per_s=link_bytes_per_s)
                change = abs(link_bytes_per_s - made.link_bytes_per_s)
                if change <= SAME_LINK * made.link_bytes_per_s or step_s <= AT_THE_BOUND * bound_s:
                    planned = budget_bytes if plan.message is None else plan.budget_bytes
                    return plan._replace(step_s=step_s, bound_s=bound_s, budget_bytes=planned)
        plan = planner.make_plan(
            asked, budget_bytes=budget_bytes, link_bytes_per_s=link_bytes_per_s, ring_bytes=ring_bytes
        )
        self._made.appendleft(_Made(asked, budget_bytes, link_bytes_per_s, ring_bytes, plan))
        return plan

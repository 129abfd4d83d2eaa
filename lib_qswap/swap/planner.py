"""Which layers stay on the device, and how large the ring is that the others pass through.

A copy engine and a compute engine that run side by side are both busy all the time if the bytes that compute
has asked for by time t stay within the ring of the straight line through (compute time of a step, swapped
bytes of a step): above it by more, compute waits for the link; below it by more, the link waits for a free
slot. So residents are spread by error diffusion over compute time (diffusion.py). What that leaves over
(layers are lumps, and the ring's end cuts slots off) is decided by the step model: plan_search.py tries some
hundreds of rings, sets and exchanges, and the best predicted step is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .plan_search import PlanSearch
from .step_model import LayerCost, Streaming, bound_step, least_step, predict_step

__all__ = ["LayerCost", "Plan", "bound_step", "least_step", "make_plan", "predict_step", "spread"]

# How many layers a search may go through after its first grid; one takes about 1 microsecond.
SEARCH_EFFORT = 100_000


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
    streaming = Streaming(layers, link_bytes_per_s)
    largest = max(streaming.nbytes, default=0)
    messages = []
    if budget_bytes < largest and budget_bytes < sum(streaming.nbytes):
        messages.append(
            f"The GPU budget of {budget_bytes / (1 << 20):.0f} MB is smaller than the largest layer: "
            f"{largest / (1 << 20):.0f} MB are used, the least that works."
        )
        budget_bytes = largest
    if sum(streaming.nbytes) <= budget_bytes:
        swapped, ring = [False] * len(layers), 0
    else:
        if ring_bytes is not None and not largest <= ring_bytes <= budget_bytes:
            allowed = min(max(ring_bytes, largest), budget_bytes)
            asked, used = (f"{nbytes / (1 << 20):.0f} MB" for nbytes in (ring_bytes, allowed))
            if asked != used:
                messages.append(
                    f"A ring of {asked} does not work here: {used} are used "
                    "(at least the largest layer, at most the budget)."
                )
            ring_bytes = allowed
        best = PlanSearch(streaming, budget_bytes, ring_bytes).best(SEARCH_EFFORT)
        swapped, ring = best.swapped, best.ring_bytes
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
        if layer.nbytes < 0 or layer.compute_s < 0 or (layer.read_s or 0) < 0:
            raise ValueError(f"layer {layer.name} has a negative size or time")
        if layer.read_s is not None and layer.read_s > layer.compute_s:
            raise ValueError(f"layer {layer.name} reads its weights for longer than it computes")

"""Which systems are measured on a rig, in which cases, and in what order."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

from step_forge import forge_rows
from step_peers import find_peers
from step_rigs import Card, Rig
from step_runner import Row, Runner

from lib_qswap.swap.home import Location

LOCATIONS: tuple[Location, ...] = ("shared", "cpu", "disk")
MARGIN = 0.1
"""Of a capped memory, for what the allocator loses: with half of it, it had to try again in every step."""


class Suite:
    """Measures all systems in all cases of a rig.

    Attributes:
        cases: what was measured so far, case by case, and card by card in each.
    """

    def __init__(
        self,
        rig: Rig,
        *,
        steps: int,
        shares: tuple[float, ...],
        cards: list[Card],
        forge: Path | None,
        job: Row,
        end_s: float,
        on_rows: Callable[[Row, list[Row]], None],
    ) -> None:
        """Args:
        steps: that are timed.
        shares: of the model, as budgets.
        cards: that the device stands for in addition to itself.
        forge: folder of a Forge web UI.
        job: what `step_forge.measure` has to know of the rig.
        end_s: on time.monotonic(); what has not begun by then is left out.
        on_rows: called with the case, and those of its rows that are new.
        """
        self.rig, self.steps, self.shares, self.cards = rig, steps, shares, cards
        self.forge, self.job, self.end_s, self.on_rows = forge, job, end_s, on_rows
        self.cases: list[Row] = []

    def run(self) -> None:
        rig = self.rig
        for name, value in rig.cases.items():
            runner = Runner(rig, self.steps)
            with rig.case(value, None):
                whole = runner.all_resident()
                if "step_s" not in whole:
                    error = whole["error"]
                    raise SystemExit(f"the whole model has to run on the device to begin with: {error}")
            with rig.case(value, runner.compute_s):
                cases = [self._begin(name, runner, whole, card) for card in (None, *self.cards)]
                # QSwap on every card before the others begin: time may run out.
                for systems in (self._own, self._others):
                    for card, shares, case in cases:
                        with rig.standing_for(card):
                            self._measure(case, systems(runner, value, card, shares))

    def _begin(
        self, name: str, runner: Runner, whole: Row, card: Card | None
    ) -> tuple[Card | None, tuple[float, ...], Row]:
        with self.rig.standing_for(card):
            link = self.rig.link_bytes_per_s()
        case: Row = {
            "case": name,
            "compute_s": runner.compute_s,
            "link_bytes_per_s": link,
            "limit_bytes": card and card.memory_bytes,
            "stands_for": card and card.label,
            "rows": [],
            "left_out": [],
        }
        self.cases.append(case)
        if card is None:
            self._add(case, [whole])
            return card, self.shares, case
        return card, (fitting_share(whole, card.memory_bytes),), case

    def _measure(self, case: Row, systems: dict[str, Callable[[], list[Row]]]) -> None:
        for name, measure in systems.items():
            if time.monotonic() < self.end_s:
                self._add(case, measure())
            else:
                case["left_out"].append(name)
                self.on_rows(case, [])

    def _add(self, case: Row, rows: list[Row]) -> None:
        case["rows"] += rows
        self.on_rows(case, rows)

    def _own(
        self, runner: Runner, value: float, card: Card | None, shares: tuple[float, ...]
    ) -> dict[str, Callable[[], list[Row]]]:
        systems: dict[str, Callable[[], list[Row]]] = {}
        if card is None and self.rig.has_dense_model:
            systems["dense"] = lambda: [runner.dense()]
        for location in LOCATIONS:
            systems[f"QSwap {location}"] = functools.partial(runner.qswap, location, shares)
        if self.rig.has_conditioning:
            again = functools.partial(runner.qswap, "shared", shares, same_prompt=True)
            systems["QSwap shared, next image"] = again
        return systems

    def _others(
        self, runner: Runner, value: float, card: Card | None, shares: tuple[float, ...]
    ) -> dict[str, Callable[[], list[Row]]]:
        systems: dict[str, Callable[[], list[Row]]] = {}
        for name, peer in find_peers(self.rig.device.device).items():
            systems[name] = lambda name=name, peer=peer: [runner.peer(name, peer)]
        if self.forge is not None:
            job = {"case": value, "card": card, "compute_s": runner.compute_s, "shares": shares}
            systems["Forge"] = functools.partial(self._forge, self.forge, self.job | job)
        return systems

    def _forge(self, folder: Path, job: Row) -> list[Row]:
        self.rig.clean_up()  # What this process keeps for later is memory that Forge's does not have.
        return forge_rows(folder, job, self.end_s - time.monotonic())


def fitting_share(whole: Row, limit_bytes: int) -> float:
    """Of the model, for a budget that leaves a step the memory that it takes beside the weights."""
    beside = whole["peak_device_bytes"] - whole["model_bytes"]
    return min(1.0, max(0.0, (limit_bytes * (1 - MARGIN) - beside) / whole["model_bytes"]))

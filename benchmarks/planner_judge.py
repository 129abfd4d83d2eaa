"""The planner's plans beside the best that a long search finds, judged by the discrete-event simulator.

    python benchmarks/planner_judge.py [--short] [--json FILE]

For each model, device, link and budget: the step that engine_simulator.py predicts for the plan and for the
best residents that planner_search.cpp finds (compiled here with $CXX or c++), and the bound of every plan,
which none can be below: the larger of compute and of what has to move, with the smallest ring that is
possible, over the link. The search starts from the plan, and, to see whether its result is to be trusted,
from the best of some thousand random constructions with other rings: `independent_s` leaves the plan out, and
`agreeing_starts` counts how many ended within 0.1 % of the best. A plan within 0.05 % of the bound is not
searched for. The result goes to benchmarks/results/planner.json; one core, some minutes. `--short` judges
every eleventh case with a short search.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import planner_models as models  # noqa: E402
from engine_simulator import Machine, simulate  # noqa: E402

from lib_qswap.swap.planner import LayerCost, Plan, make_plan  # noqa: E402
from lib_qswap.swap.planner import least_step as least_in_budget  # noqa: E402

STEPS, WARM_UP_STEPS = 20, 4
"""Of a run; the mean of the steps after the warm-up counts."""

NEAR_BOUND = 1.0005
AGREES = 1.001
SEARCH_STEPS = 4
HEATS = (0.003, 0.01)
SHORT_STRIDE = 11


class Case(NamedTuple):
    """One question to the planner; `share` of the layers' bytes is the budget, `pixels` 0 where it does not
    matter."""

    model: str
    layers: list[LayerCost]
    link_bytes_per_s: float
    share: float

    @property
    def budget_bytes(self) -> int:
        total = sum(layer.nbytes for layer in self.layers)
        return max(int(total * self.share), max(layer.nbytes for layer in self.layers))


class Effort(NamedTuple):
    """Of one search: random constructions, how many of the best are improved, and changes tried for each."""

    constructions: int
    starts: int
    changes: int


LONG, SHORT = Effort(5000, 8, 20_000), Effort(500, 3, 2000)


def cases() -> Iterator[Case]:
    shares = (0.1, 0.25, 0.5, 0.75)
    for pixels in (1024, 512):
        for quant, bits in (("Q4_K", models.Q4_K), ("Q8_0", models.Q8_0)):
            for tflops in (12, 60, 100):
                layers = models.flux(bits, tflops, pixels)
                for link in (8e9, 12e9, 16e9, 24e9):
                    for share in shares:
                        yield Case(f"Flux {quant}, {pixels} px, {tflops} TFLOPS", layers, link, share)
    others = {
        "SDXL Q8_0, 30 TFLOPS": models.sdxl_unet(models.Q8_0, 30),
        "SDXL Q8_0, 100 TFLOPS": models.sdxl_unet(models.Q8_0, 100),
        "T5 Q8_0, 30 TFLOPS": models.t5_encoder(models.Q8_0, 30),
        "T5 Q4_K, 60 TFLOPS": models.t5_encoder(models.Q4_K, 60),
        "one giant layer": models.one_giant(),
        "2,000 tiny layers": models.tiny(),
        "60 equal layers": models.equal(),
    }
    for name, layers in others.items():
        for link in (6e9, 12e9, 24e9):
            for share in shares:
                yield Case(name, layers, link, share)


def least_step(case: Case) -> float:
    """What no plan's step is below: what the budget allows, and what has to move while a ring holds the
    largest of it."""
    sizes = [layer.nbytes for layer in case.layers]
    in_budget_s = least_in_budget(
        case.layers, budget_bytes=case.budget_bytes, link_bytes_per_s=case.link_bytes_per_s
    )
    least = math.inf
    for ring in set(sizes) - {0}:
        if sum(size for size in sizes if size > ring) <= case.budget_bytes - ring:
            must_move = sum(sizes) - case.budget_bytes + ring
            least = min(least, max(in_budget_s, must_move / case.link_bytes_per_s))
    return least


class Residency(NamedTuple):
    step_s: float
    swapped: np.ndarray
    ring_bytes: int


class LongSearch:
    """planner_search.cpp, for one case."""

    def __init__(self, library: ctypes.CDLL, case: Case) -> None:
        self._library = library
        self._nbytes = np.array([layer.nbytes for layer in case.layers], np.int64)
        self._compute_s = np.array([layer.compute_s for layer in case.layers], np.float64)
        reads = [layer.compute_s if layer.read_s is None else layer.read_s for layer in case.layers]
        self._read_s = np.array(reads, np.float64)
        self._link = ctypes.c_double(case.link_bytes_per_s)
        self._budget = ctypes.c_int64(case.budget_bytes)

    def _model(self) -> tuple[Any, ...]:
        times = _pointer(self._compute_s), _pointer(self._read_s)
        return ctypes.c_int(len(self._nbytes)), _pointer(self._nbytes), *times, self._link

    def step_s(self, swapped: Sequence[bool], ring_bytes: int, averaged_steps: int) -> float:
        """The step in the search's own model."""
        array = np.array(swapped, np.uint8)
        step = self._library.planner_step_s
        step.restype = ctypes.c_double
        return step(*self._model(), _pointer(array), ctypes.c_int64(ring_bytes), ctypes.c_int(averaged_steps))

    def constructions(self, tries: int, keep: int) -> list[Residency]:
        """The best that differ of some random constructions."""
        swapped = np.zeros((keep, len(self._nbytes)), np.uint8)
        rings, steps_s = np.zeros(keep, np.int64), np.zeros(keep, np.float64)
        counts = (ctypes.c_int(tries), ctypes.c_int(SEARCH_STEPS), ctypes.c_uint64(1), ctypes.c_int(keep))
        self._library.planner_construct(
            *self._model(), self._budget, *counts, _pointer(swapped), _pointer(rings), _pointer(steps_s)
        )
        found = (Residency(float(steps_s[k]), swapped[k], int(rings[k])) for k in range(keep))
        return [residency for residency in found if math.isfinite(residency.step_s)]

    def improve(self, start: Residency, changes: int, heat: float, seed: int) -> Residency:
        """Simulated annealing from `start`; `heat` is how much slower a change may be at first."""
        swapped, ring = start.swapped.copy(), ctypes.c_int64(start.ring_bytes)
        anneal = self._library.planner_search
        anneal.restype = ctypes.c_double
        step_s = anneal(
            *self._model(),
            self._budget,
            ctypes.c_int64(int(self._nbytes.max())),
            _pointer(swapped),
            ctypes.byref(ring),
            ctypes.c_int(changes),
            ctypes.c_double(heat),
            ctypes.c_double(0.0),
            ctypes.c_int(SEARCH_STEPS),
            ctypes.c_uint64(seed),
        )
        return Residency(step_s, swapped, ring.value)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def compile_search(folder: Path) -> ctypes.CDLL:
    """The long search as a library in `folder`.

    Raises:
        OSError: there is no compiler.
        subprocess.CalledProcessError: it does not compile.
    """
    library = folder / "planner_search.so"
    source = ROOT / "benchmarks" / "planner_search.cpp"
    command = [os.environ.get("CXX", "c++"), "-O2", "-std=c++17", "-shared", "-fPIC", "-o"]
    subprocess.run([*command, str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def simulated_step(case: Case, resident: Sequence[str], ring_bytes: int) -> float:
    machine = Machine(case.link_bytes_per_s)
    steps = simulate(case.layers, resident, ring_bytes=ring_bytes, machine=machine, steps=STEPS)
    return statistics.fmean(step.seconds for step in steps[WARM_UP_STEPS:])


def judge(case: Case, library: ctypes.CDLL, effort: Effort) -> dict[str, Any]:
    begun = time.process_time()
    plan = make_plan(case.layers, budget_bytes=case.budget_bytes, link_bytes_per_s=case.link_bytes_per_s)
    planning_s = time.process_time() - begun
    kept = set(plan.resident)
    used = sum(layer.nbytes for layer in case.layers if layer.name in kept) + plan.ring_bytes
    plan_s, least_s = simulated_step(case, plan.resident, plan.ring_bytes), least_step(case)
    row = {
        "model": case.model,
        "layers": len(case.layers),
        "link_bytes_per_s": case.link_bytes_per_s,
        "budget_share": case.share,
        "budget_bytes": case.budget_bytes,
        "within_budget": used <= case.budget_bytes and plan.budget_bytes == case.budget_bytes,
        "ring_bytes": plan.ring_bytes,
        "planning_s": planning_s,
        "plan_s": plan_s,
        "step_model_s": plan.step_s,
        "bound_s": least_s,
        "searched": plan_s > least_s * NEAR_BOUND,
    }
    best = {
        "best_s": plan_s,
        "independent_s": None,
        "agreeing_starts": None,
        "best_ring_bytes": plan.ring_bytes,
    }
    if row["searched"]:
        best |= _best_of_search(case, plan, plan_s, library, effort)
    return {
        **row,
        **best,
        "plan_over_best": plan_s / best["best_s"],
        "best_over_bound": best["best_s"] / least_s,
    }


def _best_of_search(
    case: Case, plan: Plan, plan_s: float, library: ctypes.CDLL, effort: Effort
) -> dict[str, Any]:
    search = LongSearch(library, case)
    kept = set(plan.resident)
    from_plan = np.array([layer.name not in kept for layer in case.layers], np.uint8)
    starts = [Residency(plan_s, from_plan, plan.ring_bytes)]
    starts += search.constructions(effort.constructions, effort.starts)
    found: list[tuple[float, int]] = []
    for k, start in enumerate(starts):
        improved = search.improve(start, effort.changes, HEATS[k % len(HEATS)], seed=k)
        pairs = zip(case.layers, improved.swapped, strict=True)
        resident = [layer.name for layer, fetched in pairs if not fetched]
        found.append((simulated_step(case, resident, improved.ring_bytes), improved.ring_bytes))
    best_s, ring_bytes = min([(plan_s, plan.ring_bytes), *found])
    return {
        "best_s": best_s,
        "best_ring_bytes": ring_bytes,
        "independent_s": min(found[1:])[0] if found[1:] else None,
        "agreeing_starts": sum(step_s <= best_s * AGREES for step_s, _ in found),
    }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    over = [row["plan_over_best"] - 1 for row in rows]
    searched = [row for row in rows if row["searched"]]
    independent = [row["independent_s"] / row["plan_s"] - 1 for row in searched if row["independent_s"]]
    most = max(row["layers"] for row in rows)
    return {
        "cases": len(rows),
        "at_the_bound": len(rows) - len(searched),
        "over_half_a_percent": sum(share > 0.005 for share in over),
        "worst_over_best": max(over),
        "mean_over_best": statistics.fmean(over),
        "independent_search_slower": sum(share > 1e-4 for share in independent),
        "independent_search_faster": sum(share < -1e-4 for share in independent),
        "over_budget": sum(not row["within_budget"] for row in rows),
        "step_model_off_by": max(abs(row["step_model_s"] / row["plan_s"] - 1) for row in rows),
        "planning_s": max((row["planning_s"] for row in rows if row["layers"] < 1000), default=None),
        "planning_largest_s": max(row["planning_s"] for row in rows if row["layers"] == most),
        "largest_layers": most,
    }


def line_of(row: dict[str, Any]) -> str:
    line = (
        f"{row['model']:<32} {row['link_bytes_per_s'] / 1e9:3.0f} GB/s {row['budget_share']:4.0%}  "
        f"plan {row['plan_s'] * 1e3:9.3f} ms  bound {row['bound_s'] * 1e3:9.3f} ms  "
    )
    if not row["searched"]:
        return f"{line}at the bound             planned in {row['planning_s'] * 1e3:4.0f} ms"
    return (
        f"{line}+{row['plan_over_best'] - 1:.3%} of the best ({row['agreeing_starts']} starts agree)  "
        f"planned in {row['planning_s'] * 1e3:4.0f} ms"
    )


def text_of(result: dict[str, Any]) -> str:
    """JSON with one line for each row."""
    *parts, (_, rows) = result.items()
    lines = [f"{json.dumps(name)}: {json.dumps(part)}," for name, part in parts]
    return "\n".join(["{", *lines, '"rows": [', ",\n".join(map(json.dumps, rows)), "]", "}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="a sample of the cases, and a short search")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "planner.json")
    arguments = parser.parse_args()
    effort = SHORT if arguments.short else LONG
    asked = list(cases())[:: SHORT_STRIDE if arguments.short else 1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        library = compile_search(Path(folder))
        for case in asked:
            rows.append(judge(case, library, effort))
            print(line_of(rows[-1]), flush=True)
    result = {"effort": effort._asdict(), "summary": summarize(rows), "rows": rows}
    print(json.dumps(result["summary"], indent=1))
    arguments.json.write_text(text_of(result) + "\n")


if __name__ == "__main__":
    main()

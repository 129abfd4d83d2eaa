"""The measurements behind `qswap bench`: small enough for any machine, ratios taken within one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lib_qswap.panel.report import format_bytes
from lib_qswap.quant.gguf_file import open_gguf
from lib_qswap.standalone import bench_dequant
from lib_qswap.standalone.budget import Budget
from lib_qswap.standalone.demo_file import demo_file
from lib_qswap.standalone.denoise import PIXELS_PER_TOKEN
from lib_qswap.standalone.host import Settings, StandaloneHost
from lib_qswap.swap.device import device_of

RESIDENT_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS = 4
OPENINGS = 3
# The smallest image, so that bytes and not products decide the step.
STEP_PIXELS = 4 * PIXELS_PER_TOKEN

Result = tuple[Any, list[str]]


@dataclass(frozen=True)
class Options:
    """quant: type of the demo model's blocks. types, peers: see `bench_dequant.measure`."""

    quant: str
    types: Sequence[str]
    peers: Mapping[str, bench_dequant.Peer]


def run_benchmarks(names: Sequence[str], options: Options, device: torch.device) -> Result:
    """Runs the benchmarks of these names; returns their numbers, and lines of text."""
    results: dict[str, Any] = {"device": str(device), "torch": torch.__version__, "quant": options.quant}
    lines: list[str] = []
    for name in names:
        results[name], shown = BENCHMARKS[name](options, device)
        lines += [name, *(f"  {line}" for line in shown)]
    return results, lines


def dequant(options: Options, device: torch.device) -> Result:
    """Unpacking one weight of each type, beside a copy and the peers that are at hand."""
    result = bench_dequant.measure(options.types, options.peers, device)
    return result, bench_dequant.table(result)


def load(options: Options, device: torch.device) -> Result:
    """Opening the demo model, and attaching it with nothing resident, for each location."""
    path = demo_file(options.quant)
    openings = []
    for _ in range(OPENINGS):
        started = time.perf_counter()
        open_gguf(path)
        openings.append(time.perf_counter() - started)
    result: dict[str, Any] = {
        "file_bytes": path.stat().st_size,
        "open_s": min(openings),
        "attach_s": {},
    }
    for location in ("disk", "cpu", "shared"):
        started = time.perf_counter()
        host = StandaloneHost(path, device, Settings(location=location, budget=Budget(), pixels=STEP_PIXELS))
        device_of(device).synchronize()
        result["attach_s"][location] = time.perf_counter() - started
        host.close()
    lines = [
        f"open    {result['open_s'] * 1e3:8.1f} ms ({format_bytes(result['file_bytes'])})",
        *(f"{location:<7} {seconds * 1e3:8.1f} ms" for location, seconds in result["attach_s"].items()),
    ]
    return result, lines


def step(options: Options, device: torch.device) -> Result:
    """Step times of the demo model with 0 to 100 % of its bytes as budget, beside the bound."""
    path = demo_file(options.quant)
    rows = []
    for share in RESIDENT_SHARES:
        # All of it is more than the file: the scratch that weights are unpacked into counts as well.
        budget = Budget(share=share) if share < 1 else None
        host = StandaloneHost(path, device, Settings(budget=budget, steps=STEPS, pixels=STEP_PIXELS))
        _, summary = host.generate()
        model = host.snapshot()["models"][-1]
        rows.append(
            {
                "budget_share": share,
                "resident_bytes": model["bytes"]["resident"],
                "h2d_bytes_per_step": summary.h2d_bytes_per_step,
                "step_s": summary.step_seconds[-1],
                "stall_s": model["step"]["stall_s"],
                "bound_s": model["step"]["bound_s"],
                "output_sha256": summary.output_sha256,
            }
        )
        host.close()
    lines = [
        f"{row['budget_share']:4.0%}  step {row['step_s']:7.3f} s, bound {row['bound_s']:7.3f} s, "
        f"stall {row['stall_s']:7.3f} s, {format_bytes(row['h2d_bytes_per_step'])} swapped"
        for row in rows
    ]
    return {"location": "auto", "pixels": STEP_PIXELS, "budgets": rows}, lines


BENCHMARKS: dict[str, Callable[[Options, torch.device], Result]] = {
    "dequant": dequant,
    "load": load,
    "step": step,
}

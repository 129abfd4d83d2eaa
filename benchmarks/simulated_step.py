"""A step of the full-depth demo model on the simulated accelerator, beside its bound.

    python benchmarks/simulated_step.py [--quant Q4_K] [--resident 0.25] [--link-share 0.7] [--json FILE]

The link is set so that the swapped bytes take `--link-share` of the all-resident step: neither the bottleneck
nor free. The bound is max(compute, swapped bytes / bandwidth), compute (unpacking included) being the median
all-resident step of the same run. Real compute shares this machine's cores with the copies, which real
hardware does not, so the ratios here are upper limits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import simgpu

from lib_qswap.standalone.budget import Budget
from lib_qswap.standalone.demo_file import demo_file
from lib_qswap.standalone.host import Settings, StandaloneHost, Summary
from lib_qswap.swap.home import Location

LOCATIONS: tuple[Location, ...] = ("shared", "cpu", "disk")
STEPS = 6
WARM_UP_STEPS = 3
"""The first forward traces, the next two are measured for the plan."""


def measure(
    path: Path, location: Location, budget_bytes: int | None, pixels: int
) -> tuple[Summary, dict[str, Any]]:
    """One generation; returns its summary and the model's part of the snapshot at its end."""
    budget = None if budget_bytes is None else Budget(nbytes=budget_bytes)
    settings = Settings(location=location, budget=budget, steps=STEPS, pixels=pixels)
    host = StandaloneHost(path, torch.device("simgpu"), settings)
    try:
        _, summary = host.generate()
        return summary, host.snapshot()["models"][-1]
    finally:
        host.close()


def steady_seconds(summary: Summary) -> float:
    return statistics.median(summary.step_seconds[WARM_UP_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quant", default="Q4_K")
    parser.add_argument("--resident", type=float, default=0.25, help="share of the packed bytes")
    parser.add_argument(
        "--link-share", type=float, default=0.7, help="swapped bytes / bandwidth over compute"
    )
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    path = demo_file(arguments.quant)
    with simgpu.settings(total=8 << 30, h2d=0, latency=0):
        whole, model = measure(path, "shared", None, arguments.pixels)
    compute_s = steady_seconds(whole)
    swappable_bytes = model["bytes"]["resident"]
    swapped_bytes = swappable_bytes * (1 - arguments.resident)
    link = swapped_bytes / (arguments.link_share * compute_s)
    overhead_bytes = model["bytes"]["fixed"] + model["bytes"]["scratch"]
    largest = max(layer["bytes"] for layer in model["layers"])
    budget = int(swappable_bytes * arguments.resident) + overhead_bytes + 4 * largest
    rows = []
    print(f"all resident: {compute_s:.3f} s a step; link {link / 1e6:.0f} MB/s; budget {budget / 1e6:.0f} MB")
    for location in LOCATIONS:
        with simgpu.settings(total=8 << 30, h2d=link, pageable=link, latency=20e-6):
            summary, model = measure(path, location, budget, arguments.pixels)
        step_s = steady_seconds(summary)
        moved = summary.h2d_bytes_per_step
        bound_s = max(compute_s, model["step"]["h2d_bytes"] / link)
        rows.append(
            {
                "location": location,
                "homes": summary.homes,
                "resident_share": model["bytes"]["resident"] / swappable_bytes,
                "h2d_bytes_per_step": moved,
                "step_s": step_s,
                "step_seconds": summary.step_seconds,
                "stall_s": model["step"]["stall_s"],
                "bound_s": bound_s,
                "ratio": step_s / bound_s,
                "same_output": summary.output_sha256 == whole.output_sha256,
            }
        )
        print(
            f"{location:<7} {rows[-1]['resident_share']:4.0%} resident  step {step_s:.3f} s  "
            f"bound {bound_s:.3f} s  ratio {step_s / bound_s:.3f}  stall {model['step']['stall_s']:.3f} s  "
            f"same output {rows[-1]['same_output']}"
        )
    hazards = {name: count for name, count in simgpu.hazards().items() if count}
    print(f"hazards: {hazards or 'none'}")
    if arguments.json:
        result = {"compute_s": compute_s, "link_bytes_per_s": link, "rows": rows, "hazards": hazards}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Step times of the full-depth demo model, swapped by QSwap and by other programs, beside the least that a
step can take.

    python benchmarks/step_times.py [--device simgpu] [--clock virtual] [--quick] [--json FILE]
    python benchmarks/step_times.py --device cuda --hidden 3072 [--sides 512,1024] [--cards 6:12,8:13]

QSwap runs at each location with budgets of 0 to 100 % of the model's packed bytes. A budget holds residents
and the ring, beside the buffer that weights are unpacked into and what cannot be swapped; at 0 % it is a ring
of four of the largest layers. Other programs (step_peers.py) run where they are installed. They get the same
packed weights as plain bytes and compute with QSwap's own unpacking, so that only the swapping differs.

The bound is max(compute, swapped bytes / bandwidth). A row's `least_s` is what no choice of residents within
its budget can be below: a stretch of layers whose bytes take longer than its compute waits for the link,
whatever the rest of the model does (`planner.least_step`). Compute is the step of the same model with all of
it on the device, in the same run; the bandwidth is the link's, or that of reading the home where
it is less. Steps follow each other without waiting for the device, as a sampler's do.

On the simulated accelerator three cases differ in the link: one that compute decides, a balanced one and one
that the link decides. Layers keep the device busy for set times (step_models.py). Copies from pageable
memory, and to it, have half of the link's bandwidth. In virtual time nothing waits: host time and reading
from a home cost nothing, and the times are the same on any machine, while the device memory of a program
whose host runs ahead of the device is less than it would be. With `--clock real` all of it counts, and the
machine should have nothing else to do.

On a GPU cases are image sizes. With `--cards` everything runs again on a device that stands for a smaller
card, its memory capped and its link throttled (step_throttle.py): with as much of the model on it as fits
beside the computation.

`--forge` adds Forge's own methods (step_forge.py).
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import re
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import results_file  # noqa: E402
from step_peers import versions  # noqa: E402
from step_rigs import Card, SimulatedRig, make_rig  # noqa: E402
from step_runner import Row  # noqa: E402
from step_suite import Suite  # noqa: E402

from lib_qswap.standalone.demo_file import demo_file  # noqa: E402

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
QUICK_SHARES = (0.1, 0.25, 0.75)
QUICK_HIDDEN = 512
STEPS, QUICK_STEPS = 6, 2


def heading(case: Row) -> str:
    card = "" if case["stands_for"] is None else f", {case['stands_for']}"
    return (
        f"{case['case']}{card}: compute {case['compute_s']:.3f} s, "
        f"link {case['link_bytes_per_s'] / 1e6:.0f} MB/s"
    )


def line_of(row: Row) -> str:
    share = f"{row['budget_share']:4.0%}" if "budget_share" in row else "    "
    line = f"  {row['system']:<30} {share}"
    if "step_s" not in row:
        return f"{line}  {row['error']}"
    line += f"  step {row['step_s']:.3f} s"
    if "ratio" in row:
        line += f"  bound {row['bound_s']:.3f} s  ratio {row['ratio']:.3f}"
    megabytes = [
        f"{what} {row[key] / 1e6:.0f} MB"
        for what, key in (
            ("device", "peak_device_bytes"),
            ("page-locked", "page_locked_bytes"),
            ("RAM", "rss_bytes"),
        )
        if row[key] is not None
    ]
    other = "  OTHER OUTPUT" if row["same_output"] is False else ""
    return f"{line}  {'  '.join(megabytes)}{other}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", default="simgpu")
    parser.add_argument("--quant", default="Q4_K")
    parser.add_argument("--hidden", type=int, help="width of the model; Flux's is 3072")
    parser.add_argument("--clock", choices=("virtual", "real"), default="virtual", help="simulated device")
    parser.add_argument("--sides", default="512,1024", help="of images in pixels; devices that compute")
    parser.add_argument(
        "--cards",
        type=cards,
        default=[],
        metavar="6:12,8:13",
        help="all systems again with memory capped to 6 GB and the link throttled to 12 GB/s, and so on",
    )
    parser.add_argument(
        "--forge", type=Path, metavar="DIR", help="folder of a Forge web UI to measure as well"
    )
    parser.add_argument("--shares", help="budgets in percent of the model, with commas")
    parser.add_argument("--steps", type=int, help="that are timed, after those that warm up")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=math.inf,
        metavar="S",
        help="seconds; what is not begun is left out",
    )
    parser.add_argument("--quick", action="store_true", help="a narrow model and fewer budgets")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    file = demo_file(arguments.quant, hidden=arguments.hidden or (QUICK_HIDDEN if arguments.quick else 768))
    sides = [int(side) for side in arguments.sides.split(",")]
    rig = make_rig(arguments.device, file, sides, arguments.clock)
    shares = QUICK_SHARES if arguments.quick else SHARES
    if arguments.shares:
        shares = tuple(float(share) / 100 for share in arguments.shares.split(","))
    environment = rig.environment() | {
        "machine": platform.machine(),
        "torch": torch.__version__,
        **versions(),
        "date": datetime.date.today().isoformat(),
        "quant": arguments.quant,
        "model_bytes": file.stat().st_size,
    }
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else STEPS)
    slug = re.sub(r"\W+", "_", environment["name"]).strip("_").lower()
    name = "step_times" if isinstance(rig, SimulatedRig) else f"step_times_{slug}"
    path = arguments.json or ROOT / "benchmarks" / "results" / f"{name}.json"
    job = {
        "device": arguments.device,
        "file": str(file),
        "sides": sides,
        "clock": arguments.clock,
        "steps": steps,
    }
    result: Row = {"environment": environment}

    headed: list[Row] = []

    def on_rows(case: Row, rows: list[Row]) -> None:
        if not headed or headed[-1] is not case:
            headed.append(case)
            print(heading(case))
        for row in rows:
            print(line_of(row), flush=True)
        result["cases"] = suite.cases
        if isinstance(rig, SimulatedRig):
            result["hazards"] = rig.hazards()
        # After every system: whoever ends the run early keeps what there is.
        results_file.write(path, result)

    suite = Suite(
        rig,
        steps=steps,
        shares=shares,
        cards=arguments.cards,
        forge=arguments.forge,
        job=job,
        end_s=time.monotonic() + arguments.time_limit,
        on_rows=on_rows,
    )
    suite.run()
    if "hazards" in result:
        print(f"hazards: {result['hazards'] or 'none'}")
    print(f"written to {path}")


def cards(text: str) -> list[Card]:
    """Reads "6:12,8:13": gigabytes of memory, and gigabytes per second of link."""
    pairs = [pair.split(":") for pair in text.split(",")]
    try:
        return [Card(int(float(memory) * 1e9), float(link) * 1e9) for memory, link in pairs]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 6:12,8:13") from None


if __name__ == "__main__":
    main()

"""Step times of the full-depth demo model, swapped by QSwap and by other programs, beside the least that a
step can take.

    python benchmarks/step_times.py [--device simgpu] [--clock virtual] [--quick] [--json FILE]
    python benchmarks/step_times.py --device cuda --hidden 3072 [--sides 512,1024] [--limit-gb 6,8,12]

QSwap runs at each location with budgets of 0 to 100 % of the model's packed bytes. A budget holds residents
and the ring, beside the buffer that weights are unpacked into and what cannot be swapped; at 0 % it is a ring
of four of the largest layers. Other programs (step_peers.py) run where they are installed. They get the same
packed weights as plain bytes and compute with QSwap's own unpacking, so that only the swapping differs.

The bound is max(compute, swapped bytes / bandwidth). Compute is the step of the same model with all of it on
the device, in the same run; the bandwidth is the link's, or what one thread reads from the home where that is
less. Steps follow each other without waiting for the device, as a sampler's do.

On the simulated accelerator three cases differ in the link: one that compute decides, a balanced one and one
that the link decides. Layers keep the device busy for set times (step_models.py). Copies from pageable
memory, and to it, have half of the link's bandwidth. In virtual time nothing waits: host time and reading
from a home cost nothing, and the times are the same on any machine, while the device memory of a program
whose host runs ahead of the device is less than it would be. With `--clock real` all of it counts, and the
machine should have nothing else to do.

On a GPU cases are image sizes. `--limit-gb` lets QSwap run again with the device's memory capped, to stand
for a smaller card: with as much of the model on it as fits beside the computation.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from step_peers import Peer, find_peers, versions  # noqa: E402
from step_rigs import ComputingRig, Rig, SimulatedRig  # noqa: E402

from lib_qswap.standalone.demo_file import demo_file  # noqa: E402
from lib_qswap.standalone.measure import peak_device_bytes, reset_peak_device_bytes, rss_bytes  # noqa: E402
from lib_qswap.swap.home import Location  # noqa: E402
from lib_qswap.swap.manager import Attachment  # noqa: E402

LOCATIONS: tuple[Location, ...] = ("shared", "cpu", "disk")
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
QUICK_SHARES = (0.1, 0.25, 0.75)
QUICK_HIDDEN = 512
STEPS, QUICK_STEPS = 6, 2
RING_LAYERS = 4
"""Of the largest size, with a budget of 0 %."""

MARGIN = 0.05
"""Of a capped memory, for what the allocator loses."""

WARM_UP_STEPS = 4
"""The first forward traces; it and the second are measured for the plan, which is made again in the third."""

Row = dict[str, Any]


class Runner:
    """Measures systems on one rig, in one case after the other."""

    def __init__(self, rig: Rig, steps: int) -> None:
        self.rig = rig
        self.steps = steps
        self.expected: Tensor | None = None

    def all_resident(self) -> Row:
        """The model as a whole on the device: what compute takes."""
        row = self._peer("all resident", lambda model, device: model.to(device) and None)
        return row | {"swapped_bytes_per_step": 0}

    def peer(self, name: str, peer: Peer, compute_s: float) -> Row:
        row = self._peer(name, peer)
        return row | self._bound(row, compute_s, None)

    def _peer(self, name: str, peer: Peer) -> Row:
        before = self._baseline()
        model, kept = self.rig.peer_model()
        model_bytes = sum(parameter.nbytes for parameter in model.parameters())
        row: Row = {"system": name, "model_bytes": model_bytes}
        try:
            peer(model, self.rig.device.device)
            row |= self._times(model, before) | {"swapped_bytes_per_step": model_bytes}
        except torch.cuda.OutOfMemoryError:
            row["out_of_memory"] = True
        del model, kept
        return row

    def qswap(self, location: Location, shares: tuple[float, ...], compute_s: float) -> list[Row]:
        before = self._baseline()
        model = self.rig.qswap_model()
        attachment = self.rig.attach(model, location)
        rows = [self._budget(attachment, model, share, compute_s, before) for share in shares]
        attachment.detach()
        return rows

    def _budget(
        self, attachment: Attachment, model: nn.Module, share: float, compute_s: float, ram_before: int | None
    ) -> Row:
        location = attachment.location
        row: Row = {"system": f"QSwap {location}", "location": location, "budget_share": share}
        try:
            attachment.rebalance(budget_bytes(attachment, share))
            row |= self._times(model, ram_before)
        except torch.cuda.OutOfMemoryError:
            return row | {"out_of_memory": True}
        timeline = attachment.state.streamer.timeline
        timeline.collect()
        row["resident_share"] = attachment.resident_bytes / attachment.payload_bytes
        row["swapped_bytes_per_step"] = timeline.finished[-1].h2d_bytes
        return row | self._bound(row, compute_s, self.rig.home_bytes_per_s(attachment))

    def _bound(self, row: Row, compute_s: float, home_bytes_per_s: float | None) -> Row:
        if "step_s" not in row:
            return {}
        rate = min(self.rig.link_bytes_per_s(), home_bytes_per_s or math.inf)
        bound_s = max(compute_s, row["swapped_bytes_per_step"] / rate)
        return {"home_bytes_per_s": home_bytes_per_s, "bound_s": bound_s, "ratio": row["step_s"] / bound_s}

    def _baseline(self) -> int | None:
        self.rig.clean_up()
        return self._ram_bytes()

    def _ram_bytes(self) -> int | None:
        resident = rss_bytes()
        return None if resident is None else resident - self.rig.simulated_bytes()

    @torch.no_grad()
    def _times(self, model: nn.Module, ram_before: int | None) -> Row:
        device = self.rig.device
        inputs = self.rig.inputs(model)
        for _ in range(WARM_UP_STEPS):
            model(*inputs)
            device.synchronize()
        reset_peak_device_bytes(device.device)
        stream, marks = device.current_stream(), []
        for step in range(self.steps + 2):
            if step:  # One more that begins with the device idle, and does not count.
                marks.append(device.new_event(timing=True))
                device.record(marks[-1], stream)
            output = model(*inputs)
        marks.append(device.new_event(timing=True))
        device.record(marks[-1], stream)
        device.synchronize()
        page_locked, ram = self.rig.page_locked_bytes(), self._ram_bytes()
        result = output.cpu()
        if self.expected is None:
            self.expected = result
        return {
            "step_s": marks[0].elapsed_time(marks[-1]) * 1e-3 / (len(marks) - 1),
            "step_seconds": [one.elapsed_time(then) * 1e-3 for one, then in itertools.pairwise(marks)],
            "peak_device_bytes": peak_device_bytes(device.device),
            "page_locked_bytes": page_locked,
            "rss_bytes": None if ram is None or ram_before is None else ram - ram_before,
            "same_output": torch.equal(result, self.expected),
        }


def budget_bytes(attachment: Attachment, share: float) -> int:
    """Device bytes for weights with a budget of `share` of the model."""
    beside = attachment.fixed_bytes + attachment.scratch_bytes
    if share == 0:
        return beside + RING_LAYERS * max(layer.payload_bytes for layer in attachment.layers)
    return beside + math.ceil(share * attachment.payload_bytes)


def measure(rig: Rig, steps: int, shares: tuple[float, ...], limits: list[int]) -> list[Row]:
    """All systems in all cases, and QSwap again with each of the `limits` to the device's memory (bytes)."""
    results = []
    for name, value in rig.cases.items():
        runner = Runner(rig, steps)
        with rig.case(value, None):
            whole = runner.all_resident()
        compute_s = whole["step_s"]
        with rig.case(value, compute_s):
            shown: Row = {"case": name, "compute_s": compute_s, "link_bytes_per_s": rig.link_bytes_per_s()}
            rows = [whole]
            for location in LOCATIONS:
                rows += runner.qswap(location, shares, compute_s)
            for peer_name, peer in find_peers(rig.device.device).items():
                rows.append(runner.peer(peer_name, peer, compute_s))
            results.append({**shown, "limit_bytes": None, "rows": rows})
            show(results[-1])
            for limit in limits:
                rig.limit_memory(limit)
                fitting = fitting_share(whole, limit)
                rows = [row for place in LOCATIONS for row in runner.qswap(place, (fitting,), compute_s)]
                results.append({**shown, "limit_bytes": limit, "rows": rows})
                show(results[-1])
            if limits:
                rig.limit_memory(None)
    return results


def fitting_share(whole: Row, limit_bytes: int) -> float:
    """Of the model, for a budget that leaves a step the memory that it takes beside the weights."""
    beside = whole["peak_device_bytes"] - whole["model_bytes"]
    return min(1.0, max(0.0, (limit_bytes * (1 - MARGIN) - beside) / whole["model_bytes"]))


def show(result: Row) -> None:
    limit = (
        "" if result["limit_bytes"] is None else f", memory capped to {result['limit_bytes'] / 1e9:.0f} GB"
    )
    print(
        f"{result['case']}{limit}: compute {result['compute_s']:.3f} s, "
        f"link {result['link_bytes_per_s'] / 1e6:.0f} MB/s"
    )
    for row in result["rows"]:
        share = f"{row['budget_share']:4.0%}" if "budget_share" in row else "    "
        line = f"  {row['system']:<30} {share}"
        if "step_s" not in row:
            print(f"{line}  out of device memory")
            continue
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
        print(f"{line}  {'  '.join(megabytes)}{'' if row['same_output'] else '  OTHER OUTPUT'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", default="simgpu")
    parser.add_argument("--quant", default="Q4_K")
    parser.add_argument("--hidden", type=int, help="width of the model; Flux's is 3072")
    parser.add_argument("--clock", choices=("virtual", "real"), default="virtual", help="simulated device")
    parser.add_argument("--sides", default="512,1024", help="of images in pixels; devices that compute")
    parser.add_argument("--limit-gb", default="", help="QSwap again with device memory capped, with commas")
    parser.add_argument("--shares", help="budgets in percent of the model, with commas")
    parser.add_argument("--steps", type=int, help="that are timed, after those that warm up")
    parser.add_argument("--quick", action="store_true", help="a narrow model and fewer budgets")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    file = demo_file(arguments.quant, hidden=arguments.hidden or (QUICK_HIDDEN if arguments.quick else 768))
    rig: Rig
    if arguments.device == "simgpu":
        rig = SimulatedRig(file, compute_s=1.0, virtual=arguments.clock == "virtual")
    else:
        sides = [int(side) for side in arguments.sides.split(",")]
        rig = ComputingRig(torch.device(arguments.device), file, sides)
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
    limits = [int(float(limit) * 1e9) for limit in arguments.limit_gb.split(",") if limit]
    cases = measure(rig, steps, shares, limits)
    result: Row = {"environment": environment, "cases": cases}
    if isinstance(rig, SimulatedRig):
        result["hazards"] = rig.hazards()
        print(f"hazards: {result['hazards'] or 'none'}")
    slug = re.sub(r"\W+", "_", environment["name"]).strip("_").lower()
    name = "step_times" if isinstance(rig, SimulatedRig) else f"step_times_{slug}"
    path = arguments.json or ROOT / "benchmarks" / "results" / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()

"""What a GPU reaches: the ceilings of its link, memory and compute, then unpacking, page-locking, switching
and memory while the host runs ahead, then steps beside other programs.

    python benchmarks/gpu_suite.py [--device cuda] [--types Q4_K,Q8_0] [--forge DIR] [--small] [--json FILE]

Every section is a process of its own: one that fails, hangs or takes the device down with it costs no other.
The suite ends within `--time-limit` (ten minutes) and keeps what it has by then. The result goes to
benchmarks/results/gpu_<device>.json after every section, that of step_times.py, the last, to
gpu_<device>_steps.json. At the end come the figures that are aimed at, and whether they were reached.

Times of operations are taken on tensors that together are larger than the GPU's cache, and on CUDA within a
graph, so that the host's time for a launch is not in them; that is measured by itself. Bandwidth counts the
bytes read and the bytes written. `--small` is a quick run of every part on any device, the CPU and the
simulated accelerator (simgpu) included.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import gpu_engine  # noqa: E402
import gpu_host  # noqa: E402
import gpu_unpack  # noqa: E402
import results_file  # noqa: E402
from gpu_targets import targets  # noqa: E402
from gpu_timer import MB, Timer, wall_seconds  # noqa: E402
from step_rigs import ComputingRig  # noqa: E402

from lib_qswap.quant import kernels  # noqa: E402
from lib_qswap.standalone.demo_file import demo_file  # noqa: E402

TIME_LIMIT_S = 590.0
COPIES = 4
"""Times the bytes that cross the link, for copies within the device."""
STEPS_MARGIN_S = 30.0
"""Before the end, from which on no system begins its steps."""

CARDS = "6:12,8:13,12:24"
"""Gigabytes, and gigabytes per second of link: PCIe 3.0 x 16, 4.0 x 8 and 4.0 x 16 in practice."""

Save = Callable[[Any], None]


def environment(arguments: argparse.Namespace, timer: Timer, save: Save) -> None:
    device = timer.device
    found: dict[str, Any] = {
        "device": str(device),
        "name": platform.machine(),
        "torch": torch.__version__,
        "triton": None,
        "unpack_kernel": kernels.in_use(device),
    }
    if found["unpack_kernel"] != "Torch":
        import triton

        found["triton"] = triton.__version__
    if device.type in ("cuda", "xpu"):
        properties = getattr(torch, device.type).get_device_properties(device)
        found["name"], found["memory_bytes"] = properties.name, properties.total_memory
    elif device.type == "simgpu":
        found["name"] = "simulated accelerator"
    print(json.dumps(found))
    save(found)


def ceilings(arguments: argparse.Namespace, timer: Timer, save: Save) -> None:
    """Bytes per second: a copy within the device (read and written), and each way over the link; operations
    per second of a product of matrices."""
    nbytes = (1 if arguments.small else 512) * MB
    found = {"device_copy_bytes_per_s": copy_bytes_per_s(timer, COPIES * nbytes)}
    here = torch.empty(nbytes, dtype=torch.uint8, device=timer.device)
    pageable = torch.ones(nbytes, dtype=torch.uint8)
    found["link_pageable_bytes_per_s"] = nbytes / wall_seconds(timer, lambda: here.copy_(pageable))
    if timer.device.type not in ("cpu", "mps"):
        locked = pageable.pin_memory()
        found["link_page_locked_bytes_per_s"] = nbytes / wall_seconds(
            timer, lambda: here.copy_(locked, non_blocking=True)
        )
        found["link_back_page_locked_bytes_per_s"] = nbytes / wall_seconds(
            timer, lambda: locked.copy_(here, non_blocking=True)
        )
    side = 256 if arguments.small else 8192
    dtype = getattr(torch, arguments.dtype)
    left, right = (torch.ones((side, side), dtype=dtype, device=timer.device) for _ in range(2))
    out = torch.empty_like(left)
    seconds = timer.seconds([lambda: torch.mm(left, right, out=out)])
    found["matrix_operations_per_s"] = 2.0 * side**3 / seconds
    for name, rate in found.items():
        unit = "Top/s" if "operations" in name else "GB/s"
        print(f"{name:<34} {rate / (1e12 if 'operations' in name else 1e9):8.2f} {unit}")
    save(found)


def copy_bytes_per_s(timer: Timer, nbytes: int) -> float:
    """Of a copy within the device, outside of a graph: in one, CUDA copies half a gigabyte more slowly."""
    here = torch.empty(nbytes, dtype=torch.uint8, device=timer.device)
    there = [torch.empty_like(here) for _ in range(2)]
    copies = [lambda other=other: other.copy_(here) for other in there]
    return 2 * nbytes / timer.seconds(copies, graph=False)


def unpack(arguments: argparse.Namespace, timer: Timer, save: Save) -> None:
    """See gpu_unpack.py. The copy bandwidth is measured once more, in the process that it is compared in."""
    copy = copy_bytes_per_s(timer, (1 if arguments.small else 512) * COPIES * MB)
    found: dict[str, Any] = {"copy_bytes_per_s": copy, "types": {}}

    def on_row(name: str, row: dict[str, Any]) -> None:
        found["types"].setdefault(name, []).append(row)
        print(gpu_unpack.line_of(name, row), flush=True)
        save(found)

    found["left_out"] = gpu_unpack.unpacking(
        arguments.types or gpu_unpack.TYPES,
        getattr(torch, arguments.dtype),
        timer,
        copy,
        arguments.small,
        # A type that has begun takes a few seconds.
        time.monotonic() + arguments.time_limit - (0 if arguments.small else 15),
        on_row,
    )
    save(found)


def page_lock(arguments: argparse.Namespace, timer: Timer, save: Save) -> None:
    size = gpu_engine.SMALL_PAGE_LOCK_BYTES if arguments.small else gpu_engine.PAGE_LOCK_BYTES
    found = gpu_engine.page_locking(timer, size)
    print(json.dumps(found))
    save(found)


def host(arguments: argparse.Namespace, timer: Timer, save: Save) -> None:
    found = gpu_host.host_times(timer.device, arguments.small)
    print(json.dumps(found))
    save(found)


def engine(arguments: argparse.Namespace, timer: Timer, save: Save) -> None:
    side = 16 if arguments.small else 1024
    rig = ComputingRig(timer.device, model_file(arguments.small), [side])
    found: dict[str, Any] = {}

    def on_part(parts: dict[str, Any]) -> None:
        found.update(parts)
        save(found)

    if not arguments.small:
        gpu_engine.engine(rig, gpu_engine.STEPS, on_part)
    else:
        # The simulated accelerator takes seconds for each step that is computed: too many for these.
        shares = () if arguments.device == "simgpu" else gpu_engine.PROMPT_SHARES[:1]
        gpu_engine.engine(
            rig, gpu_engine.SMALL_STEPS, on_part, shares=shares, image_steps=gpu_engine.SMALL_IMAGE_STEPS
        )
    print(json.dumps(found))


SECTIONS: dict[str, tuple[Callable[[argparse.Namespace, Timer, Save], None], float]] = {
    "environment": (environment, 60),
    "ceilings": (ceilings, 45),
    "unpack": (unpack, 120),
    "page_lock": (page_lock, 30),
    "host": (host, 30),
    "engine": (engine, 100),
}
"""Each with the seconds that it may take. Steps have the rest."""


def model_file(small: bool) -> Path:
    return demo_file("Q4_K", hidden=256 if small else 3072)


class Suite:
    """Runs the sections one after the other and keeps their results in one file. This process leaves the
    device alone: its memory is the sections'."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.path: Path | None = arguments.json
        self.end_s = time.monotonic() + arguments.time_limit
        self.result: dict[str, Any] = {"dtype": arguments.dtype, "errors": {}}

    def run(self) -> Path:
        """Returns where the result is."""
        try:
            model_file(self.arguments.small)  # Once, so that no section's time goes into it.
        except OSError as error:
            self.result["errors"]["model"] = str(error)
        for name, (_, most_s) in SECTIONS.items():
            self._section(name, most_s)
        path = self._save()
        steps_path = path.with_name(f"{path.stem}_steps.json")
        steps_path.unlink(missing_ok=True)
        self._steps(steps_path)
        steps = json.loads(steps_path.read_text()) if steps_path.exists() else {}
        found = targets(self.result, steps)
        self.result["targets"] = [target.as_dict() for target in found]
        for target in found:
            wanted = f">= {target.at_least:g}" if target.at_most is None else f"<= {target.at_most:g}"
            print(f"{'met   ' if target.met else 'MISSED'} {target.value:10.3f} {wanted:<8} {target.what}")
        for name, error in self.result["errors"].items():
            print(f"{name}: {error}")
        return self._save()

    def _section(self, name: str, most_s: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            if self.arguments.small:  # No GPU's time is at stake, and the machine may be slow.
                most_s *= 3
            limit_s = min(most_s, self.end_s - time.monotonic())
            options = ["--section", name, "--time-limit", f"{limit_s:.0f}", "--json", str(part)]
            self._child(name, [__file__, *self._options(), *options], limit_s)
            if part.exists():
                self.result[name] = json.loads(part.read_text())
        self._save()

    def _options(self) -> list[str]:
        arguments = self.arguments
        options = ["--device", arguments.device, "--dtype", arguments.dtype]
        if arguments.types:
            options += ["--types", ",".join(arguments.types)]
        return options + (["--small"] if arguments.small else [])

    def _steps(self, path: Path) -> None:
        """Steps of a model of Flux's sizes, with all of the memory and on what stands for smaller cards."""
        left_s = self.end_s - time.monotonic()
        options = ["--hidden", "256", "--sides", "16", "--shares", "25", "--steps", "1"]
        if not self.arguments.small:
            options = ["--hidden", "3072", "--sides", "1024"]
            options += ["--cards", self.arguments.cards] if self.arguments.cards else []
            options += ["--steps", str(self.arguments.steps)]
            options += ["--shares", self.arguments.shares] if self.arguments.shares else []
        if self.arguments.forge:
            options += ["--forge", str(self.arguments.forge)]
        options += ["--device", self.arguments.device, "--json", str(path)]
        options += ["--time-limit", f"{max(0.0, left_s - STEPS_MARGIN_S):.0f}"]
        self._child("steps", [str(ROOT / "benchmarks" / "step_times.py"), *options], left_s)

    def _child(self, name: str, command: list[str], limit_s: float) -> None:
        print(f"--- {name}", flush=True)
        if limit_s <= 0:
            self.result["errors"][name] = "no time was left"
            return
        try:
            subprocess.run([sys.executable, *command], check=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            self.result["errors"][name] = f"cut off after {limit_s:.0f} s"
        except subprocess.CalledProcessError as error:
            self.result["errors"][name] = f"ended with exit code {error.returncode}"

    def _save(self) -> Path:
        if self.path is None:
            name = self.result.get("environment", {}).get("name", self.arguments.device)
            slug = re.sub(r"\W+", "_", name).strip("_").lower()
            self.path = ROOT / "benchmarks" / "results" / f"gpu_{slug}.json"
        results_file.write(self.path, self.result)
        return self.path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--types", type=lambda text: text.split(","), help="GGML types; all by default")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--forge", type=Path, metavar="DIR", help="folder of a Forge web UI to measure as well"
    )
    parser.add_argument(
        "--cards",
        default=CARDS,
        help=f"that the GPU stands for too, as for step_times.py; {CARDS} by default",
    )
    parser.add_argument("--steps", type=int, default=6, help="that are timed")
    parser.add_argument("--shares", help="budgets of the steps, as for step_times.py")
    parser.add_argument("--small", action="store_true", help="a quick run with tiny tensors")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, metavar="S", help="seconds")
    parser.add_argument("--section", choices=SECTIONS, help="only this one, in this process")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "simgpu":
        import simgpu  # noqa: F401 it makes the device known to torch
    if arguments.section:
        measure, _ = SECTIONS[arguments.section]
        timer = Timer(torch.device(arguments.device), arguments.small)

        def save(found: Any) -> None:
            if arguments.json:
                results_file.write(arguments.json, found)

        measure(arguments, timer, save)
        return
    print(f"written to {Suite(arguments).run()}")


if __name__ == "__main__":
    main()

"""The measurements behind `qswap bench`: small enough for any machine, ratios taken within one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lib_qswap.panel.report import format_bytes
from lib_qswap.quant.gguf_file import open_gguf
from lib_qswap.standalone import bench_dequant, bench_step
from lib_qswap.standalone.budget import Budget
from lib_qswap.standalone.demo_file import demo_file
from lib_qswap.standalone.headless import Progress
from lib_qswap.standalone.host import Settings, StandaloneHost
from lib_qswap.swap.device import device_of
from lib_qswap.swap.home import Location

OPENINGS = 3

Result = tuple[Any, list[str]]


@dataclass(frozen=True)
class Options:
    """quant: type of the demo model's blocks. locations: see `bench_step.measure`; types, peers: see
    `bench_dequant.measure`."""

    quant: str
    locations: Sequence[Location]
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
        host = StandaloneHost(
            path, device, Settings(location=location, budget=Budget(), pixels=bench_step.PIXELS)
        )
        device_of(device).synchronize()
        result["attach_s"][location] = time.perf_counter() - started
        host.close()
    lines = [
        f"open    {result['open_s'] * 1e3:8.1f} ms ({format_bytes(result['file_bytes'])})",
        *(f"{location:<7} {seconds * 1e3:8.1f} ms" for location, seconds in result["attach_s"].items()),
    ]
    return result, lines


def step(options: Options, device: torch.device) -> Result:
    """Steps of the demo model by location and budget, beside the bound."""
    progress = Progress("measuring steps")
    result = bench_step.measure(demo_file(options.quant), options.locations, device, progress)
    return result, bench_step.table(result)


BENCHMARKS: dict[str, Callable[[Options, torch.device], Result]] = {
    "dequant": dequant,
    "load": load,
    "step": step,
}

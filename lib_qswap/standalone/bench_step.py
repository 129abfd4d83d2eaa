"""`qswap bench step`: steps of the demo model by location and budget, beside the least that they can take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.cuda import OutOfMemoryError  # of every device, by the name that torch 2.3 has as well

from lib_qswap.panel.report import format_bytes
from lib_qswap.standalone.budget import Budget
from lib_qswap.standalone.denoise import PIXELS_PER_TOKEN
from lib_qswap.standalone.host import Settings, StandaloneHost
from lib_qswap.standalone.measure import (
    peak_device_bytes,
    read_bytes_per_s,
    reset_peak_device_bytes,
    rss_bytes,
)
from lib_qswap.swap import ledger
from lib_qswap.swap.device import device_of
from lib_qswap.swap.device_state import state_of
from lib_qswap.swap.home import Location

LOCATIONS: tuple[Location, ...] = ("shared", "cpu", "disk")
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
WARM_UP_STEPS = 3
"""The first traces; it and the second are measured for the plan, which is made again in the third."""
TIMED_STEPS = 3
# The smallest image, so that bytes and not products decide the step.
PIXELS = 4 * PIXELS_PER_TOKEN

Row = dict[str, Any]


def measure(
    path: Path,
    locations: Sequence[Location],
    device: torch.device,
    on_progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Steps of the model in the file with 0 to 100 % of its bytes as budget, from each of the locations.

    Returns {"pixels", "compute_s", "rows"}. compute_s: a step with all of the model on the device; None where
    it does not fit. `on_progress` is called with the share of the rows that are done.

    A row has the step, its bound, max(compute, swapped bytes / bandwidth), and how many times the bound the
    step took; the bandwidth is the link's, or that of reading the home where it is less. Its
    bytes are the device's peak, what is page-locked, and by how much the process's RAM has grown since before
    the model was opened; None where that is not known. A row without room for its budget has "out_of_memory"
    instead.
    """
    # Each row is to be that of a first image.
    settings = Settings(steps=WARM_UP_STEPS + TIMED_STEPS, pixels=PIXELS, keeps_outputs=False)
    bench = _Bench(path, device, settings)
    whole = bench.row(1.0)
    bench.host.close()
    compute_s = whole["step_s"] if whole.get("resident_share") == 1 else None
    rows: list[Row] = []
    for location in locations:
        bench = _Bench(path, device, replace(settings, location=location, budget=Budget()))
        for share in SHARES:
            row = bench.row(share)
            rows.append(row | _bound(row, compute_s) if "step_s" in row else row)
            on_progress(len(rows) / (len(locations) * len(SHARES)))
        bench.host.close()
    return {"pixels": PIXELS, "compute_s": compute_s, "rows": rows}


def _bound(row: Row, compute_s: float | None) -> Row:
    # Where the model does not fit whole, what stalls leave of this very step.
    least_s = row["step_s"] - row["stall_s"] if compute_s is None else compute_s
    rate = min(row["link_bytes_per_s"], row["home_bytes_per_s"] or math.inf)
    bound_s = max(least_s, row["swapped_bytes_per_step"] / rate)
    return {"bound_s": bound_s, "ratio": row["step_s"] / bound_s}


def table(result: dict[str, Any]) -> list[str]:
    """A line for each row, megabytes in units of 1024 as everywhere."""
    lines = [
        f"{'from':<7}{'budget':>7}{'resident':>9}{'step':>10}{'bound':>10}{'ratio':>7}"
        f"{'device peak':>13}{'page-locked':>13}{'RAM':>9}"
    ]
    for row in result["rows"]:
        line = f"{row['location']:<7}{row['budget_share']:>7.0%}"
        if "step_s" not in row:
            lines.append(f"{line}  the device has no room for it")
            continue
        peak, locked, ram = (
            format_bytes(row[name]) for name in ("peak_device_bytes", "page_locked_bytes", "rss_bytes")
        )
        lines.append(
            f"{line}{row['resident_share']:>9.0%}{row['step_s']:>8.3f} s{row['bound_s']:>8.3f} s"
            f"{row['ratio']:>7.3f}{peak:>13}{locked:>13}{ram:>9}"
        )
    return lines


class _Bench:
    """One model at one location."""

    def __init__(self, path: Path, device: torch.device, settings: Settings) -> None:
        self.ram_before = rss_bytes()
        self.host = StandaloneHost(path, device, settings)

    def row(self, share: float) -> Row:
        """Measures with `share` of the model as budget."""
        # All of it is more than the file: the scratch that weights are unpacked into counts as well.
        budget = Budget(share=share) if share < 1 else None
        self.host.use(replace(self.host.settings, budget=budget))
        row: Row = {"location": self.host.settings.location, "budget_share": share}
        reset_peak_device_bytes(self.host.device)
        try:
            _, summary = self.host.generate()
        except OutOfMemoryError:
            return row | {"out_of_memory": True}
        model = self.host.snapshot()["models"][-1]
        ram = rss_bytes()
        return row | {
            "budget_bytes": summary.budget_bytes,
            "resident_share": model["bytes"]["resident"] / sum(layer["bytes"] for layer in model["layers"]),
            "swapped_bytes_per_step": model["bytes"]["swapped_per_step"],
            "step_s": statistics.median(summary.step_seconds[WARM_UP_STEPS:]),
            "stall_s": model["step"]["stall_s"],
            "peak_device_bytes": peak_device_bytes(self.host.device),
            "page_locked_bytes": state_of(device_of(self.host.device)).pin_budget.used_bytes,
            "rss_bytes": None if ram is None or self.ram_before is None else ram - self.ram_before,
            "output_sha256": summary.output_sha256,
            "link_bytes_per_s": model["step"]["link_bytes_per_s"],
            "home_bytes_per_s": read_bytes_per_s(ledger.attachments()[-1].layers),
        }

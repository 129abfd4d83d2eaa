"""The stand-alone host without a page: progress on stderr, the summary and the residency table on stdout."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib_qswap.panel.report import format_bytes, printable, residency_table, summary_lines
from lib_qswap.standalone.host import StandaloneHost, Summary

BAR_CELLS = 30


class Progress:
    """A bar that redraws itself on a terminal, and a line now and then (each tenth at most) anywhere else."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._stream = sys.stderr
        self._started = time.perf_counter()
        self._shown = -1

    def __call__(self, share: float) -> None:
        if self._stream.isatty():
            full = round(share * BAR_CELLS)
            bar = "#" * full + "-" * (BAR_CELLS - full)
            self._stream.write(f"\r{self._title} [{bar}] {share:4.0%} {self._seconds()}")
            if share >= 1:
                self._stream.write("\n")
            self._stream.flush()
        elif (tenths := int(share * 10)) > self._shown:
            self._shown = tenths
            self._stream.write(f"{self._title} {share:.0%} {self._seconds()}\n")

    def _seconds(self) -> str:
        return f"{time.perf_counter() - self._started:.1f} s"


def run_headless(host: StandaloneHost) -> tuple[Summary, dict[str, Any]]:
    """One generation, and what was where at its end; the model's device copies are dropped afterwards.

    Returns the summary, and the ledger's snapshot from before they were dropped. Raises what
    `StandaloneHost.generate` raises.
    """
    progress = Progress("denoising")
    progress(0.0)
    _, summary = host.generate(lambda done: progress(done / host.settings.steps))
    snapshot = host.snapshot()
    return replace(summary, d2h_bytes=host.unload()), snapshot


def report(path: Path, summary: Summary, snapshot: dict[str, Any]) -> str:
    """The summary and the residency table for a terminal."""
    steps = ", ".join(f"{seconds:.2f}" for seconds in summary.step_seconds)
    homes = ", ".join(f"{count} {home}" for home, count in summary.homes.items())
    lines = [
        printable(path),
        f"  steps         {summary.steps}: {steps} s (compute {summary.compute_seconds:.2f} s, "
        f"stalls {summary.stall_seconds:.2f} s)",
        f"  location      {summary.location}; homes of {summary.layers} layers: {homes}",
        f"  device        {format_bytes(summary.device_weight_bytes_peak)} of weights at most, "
        f"budget {format_bytes(summary.budget_bytes)}",
        f"  swapped       {format_bytes(summary.h2d_bytes_per_step)} per step, "
        f"{format_bytes(summary.d2h_bytes)} back down",
        f"  host          {format_bytes(summary.peak_rss_bytes)} of RAM at most, "
        f"{format_bytes(summary.pinned_bytes)} page-locked",
        f"  output        sha256 {summary.output_sha256}",
        "",
        residency_table(snapshot),
        "",
        *summary_lines(snapshot),
        # The lines above have the warnings.
        *(f"note: {printable(note['text'])}" for note in snapshot["messages"] if note["level"] == "info"),
    ]
    return "\n".join(lines)

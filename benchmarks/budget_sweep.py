"""The automatic budget beside every fixed one, on the simulated accelerator in virtual time.

    python benchmarks/budget_sweep.py [--mb 32] [--json FILE]

A model of 80 equal layers on a device that cannot hold it beside what its steps compute with: little (as at
512 x 512), or much (as at 1024 x 1024). A fixed budget is what a person sets by hand ("GPU Weights"): too
little and layers are swapped for nothing, too much and the step runs out of memory. The automatic one begins
with what Forge reserves for computing left free, and follows what the first steps took.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import simgpu

from lib_qswap.swap import ledger
from lib_qswap.swap.manager import Attachment, attached

MB = 1 << 20
LAYERS = 80
# In layers' sizes: the device, what is left free for computing at first, and what two kinds of steps take.
DEVICE = 96
RESERVED = 32
NEEDS = {"512 px": 6, "1024 px": 24}
COMPUTE_S = 0.010
COPY_S = 0.060
"""Of a layer: the link is what limits a step."""
STEPS = 8


class Layers(torch.nn.Module):
    """Layers that take COMPUTE_S each, with a temporary of `need` bytes in their midst."""

    def __init__(self, layer_bytes: int) -> None:
        super().__init__()
        weight = torch.ones(1024, layer_bytes // 2048, dtype=torch.float16)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(*weight.shape, bias=False, device="meta") for _ in range(LAYERS)
        )
        for layer in self.layers:
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            layer.forward = _compute  # type: ignore[method-assign]

    def forward(self, x: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == LAYERS // 2:
                torch.empty(need.shape[0], dtype=torch.uint8, device=x.device)
        return x


def _compute(x: torch.Tensor) -> torch.Tensor:
    simgpu.busy(COMPUTE_S)
    return x


def steady_step_s(attachment: Attachment, model: torch.nn.Module, need_bytes: int) -> float:
    x = torch.ones(1, device="simgpu")
    need = torch.empty(need_bytes, 0, device="simgpu")
    attachment.run.begin(STEPS)
    for _ in range(STEPS):
        begun_s = simgpu.now()
        model(x, need)
        torch.simgpu.synchronize()  # type: ignore[attr-defined]
    return simgpu.now() - begun_s


def measure(layer_bytes: int, need_bytes: int, budget_bytes: int | None) -> dict[str, Any]:
    """One budget, fixed or (None) automatic."""
    simgpu.reset()
    started = time.time()
    budget, spare = budget_bytes, 0
    if budget is None:
        budget, spare = (DEVICE - RESERVED) * layer_bytes, RESERVED * layer_bytes
    model = Layers(layer_bytes)
    with attached(model, device="simgpu:0", location="shared", budget_bytes=budget) as attachment:
        attachment.rebalance(budget, spare_bytes=spare)
        step_s = steady_step_s(attachment, model, need_bytes)
        return {
            "budget_bytes": budget_bytes,
            "step_s": step_s,
            "in_force_bytes": attachment.budget_bytes,
            "resident_bytes": attachment.resident_bytes,
            "ran_out": any(
                entry["t"] >= started and "ran out" in entry["text"]
                for entry in ledger.snapshot()["messages"]
            ),
        }


def sweep(layer_bytes: int, sizes: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """For each kind of step: the automatic budget, then the fixed ones, of so many layers' sizes."""
    with (
        simgpu.settings(total=DEVICE * layer_bytes, h2d=layer_bytes / COPY_S, latency=0, virtual_time=1),
        torch.inference_mode(),
    ):
        fixed = [size * layer_bytes for size in sizes]
        return {
            name: [measure(layer_bytes, need * layer_bytes, budget) for budget in (None, *fixed)]
            for name, need in NEEDS.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mb", type=int, default=32, help="size of a layer")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = sweep(arguments.mb * MB, range(16, DEVICE + 1, 8))
    for name, rows in results.items():
        print(name)
        for row in rows:
            budget = "automatic" if row["budget_bytes"] is None else f"{row['budget_bytes'] / MB:.0f} MB"
            print(
                f"  {budget:>9}: step {row['step_s']:.3f} s, {row['resident_bytes'] / MB:.0f} MB resident"
                + (", ran out of memory" if row["ran_out"] else "")
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

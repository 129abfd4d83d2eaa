"""The measurements behind `qswap bench`: small enough for any machine, ratios taken within one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lib_qswap.panel.report import format_bytes
from lib_qswap.quant.formats import FORMATS
from lib_qswap.quant.gguf_file import open_gguf
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.standalone.budget import Budget
from lib_qswap.standalone.demo_file import BLOCKS, demo_file, quantized_weight
from lib_qswap.standalone.denoise import PIXELS_PER_TOKEN
from lib_qswap.standalone.host import Settings, StandaloneHost, computation_dtype
from lib_qswap.swap.device import device_of

REPEATS = 5
WEIGHT_SHAPE = (3072, 3072)
RESIDENT_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS = 4
# The smallest image, so that bytes and not products decide the step.
STEP_PIXELS = 4 * PIXELS_PER_TOKEN

Result = tuple[Any, list[str]]


def run_benchmarks(names: Sequence[str], *, quant: str, device: torch.device) -> Result:
    """Runs the benchmarks of these names; returns their numbers, and lines of text."""
    results: dict[str, Any] = {"device": str(device), "torch": torch.__version__, "quant": quant}
    lines: list[str] = []
    for name in names:
        results[name], shown = BENCHMARKS[name](quant, device)
        lines += [name, *(f"  {line}" for line in shown)]
    return results, lines


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of a few calls after one that warms up, each until the device is done."""
    synchronize = device_of(device).synchronize
    run()
    taken = []
    for _ in range(REPEATS):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def dequant(_quant: str, device: torch.device) -> Result:
    """Unpacking one weight of each type, beside a plain copy and gguf-py (on the CPU, if installed)."""
    dtype = computation_dtype(device)
    out = torch.empty(WEIGHT_SHAPE, dtype=dtype, device=device)
    copied = torch.empty_like(out)
    copy_s = median_seconds(lambda: copied.copy_(out), device)
    gguf_py = _gguf_py()
    rows = {}
    for name in BLOCKS:
        packed = quantized_weight(name, WEIGHT_SHAPE)
        weight = PackedTensor(packed.to(device), FORMATS[name], WEIGHT_SHAPE, dtype=dtype)
        row = {"qswap_s": median_seconds(partial(weight.dequantize, out=out), device)}
        row["copies"] = row["qswap_s"] / copy_s
        if gguf_py is not None:
            row["gguf_py_s"] = median_seconds(partial(gguf_py, name, packed), torch.device("cpu"))
            row["times_faster_than_gguf_py"] = row["gguf_py_s"] / row["qswap_s"]
        rows[name] = row
    elements = out.numel()
    lines = [
        f"{name:<7} {elements / row['qswap_s'] / 1e9:7.3f} G weights/s, {row['copies']:5.1f} copies of it"
        + (f", {row['times_faster_than_gguf_py']:.1f} x as fast as gguf-py" if "gguf_py_s" in row else "")
        for name, row in rows.items()
    ]
    return {"dtype": str(dtype), "elements": elements, "copy_s": copy_s, "types": rows}, lines


def _gguf_py() -> Callable[[str, torch.Tensor], object] | None:
    try:
        import gguf
    except ImportError:
        return None
    return lambda name, packed: gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name])


def load(quant: str, device: torch.device) -> Result:
    """Opening the demo model, and attaching it with nothing resident, for each location."""
    path = demo_file(quant)
    started = time.perf_counter()
    open_gguf(path)
    result: dict[str, Any] = {
        "file_bytes": path.stat().st_size,
        "open_s": time.perf_counter() - started,
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


def step(quant: str, device: torch.device) -> Result:
    """Step times of the demo model with 0 to 100 % of its bytes as budget, beside the bound."""
    path = demo_file(quant)
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


BENCHMARKS: dict[str, Callable[[str, torch.device], Result]] = {
    "dequant": dequant,
    "load": load,
    "step": step,
}

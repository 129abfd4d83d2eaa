"""What a GPU reaches: copies, unpacking with Triton and with torch, beside the chain of torch operations that
other programs use.

    python benchmarks/gpu_suite.py [--device cuda] [--types Q4_K,Q8_0] [--small] [--json FILE]

Every number is taken on tensors that together are larger than the GPU's cache, and on CUDA within a graph, so
that the host's time for a launch is not in it; that is measured by itself. Bandwidth counts the bytes read
and the bytes written. The result goes to benchmarks/results/gpu_<device>.json, and that of step_times.py,
which runs last, to gpu_<device>_steps.json. `--small` is a quick run of every part on any device, the CPU
included.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ggml_blocks  # noqa: E402
from torch_chains import CHAINS  # noqa: E402

from lib_qswap.quant import kernels, multiply  # noqa: E402
from lib_qswap.quant.formats import FORMATS, Format  # noqa: E402
from lib_qswap.quant.packed import PackedTensor  # noqa: E402
from lib_qswap.quant.unpack import unpack  # noqa: E402
from lib_qswap.swap.device import device_of  # noqa: E402

# Flux: projections, MLP up and down, qkv, modulation, a single block's linear2.
FLUX_SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288), (9216, 3072), (18432, 3072), (3072, 15360))
SMALL_SHAPES = ((64, 512), (512, 256))
MB = 1 << 20


class Timer:
    """Seconds of one call: the median of a few rounds, each of calls on one set of tensors after the other.

    working_set_bytes: how much the sets of a measurement take together at least, more than any cache.
    """

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device = device
        self.rounds = 3 if small else 9
        self.working_set_bytes = MB if small else 1024 * MB
        self.synchronize = device_of(device).synchronize

    def sets(self, nbytes: int) -> int:
        return max(2, -(-self.working_set_bytes // nbytes))

    def seconds(self, calls: list[Callable[[], object]]) -> float:
        for call in calls:
            call()
        self.synchronize()
        run = self._graph(calls) if self.device.type == "cuda" else lambda: [call() for call in calls]
        taken = []
        for _ in range(self.rounds):
            taken.append(self._once(run))
        return statistics.median(taken) / len(calls)

    def host_seconds(self, calls: list[Callable[[], object]]) -> float:
        """Until the call returns, whatever the device still has to do."""
        taken = []
        for call in calls:
            self.synchronize()
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def _graph(self, calls: list[Callable[[], object]]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        return graph.replay

    def _once(self, run: Callable[[], object]) -> float:
        self.synchronize()
        if self.device.type in ("cuda", "xpu"):
            module = getattr(torch, self.device.type)
            start, end = (module.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            self.synchronize()
            return start.elapsed_time(end) / 1e3
        begun = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - begun


def ceilings(timer: Timer, small: bool) -> dict[str, float]:
    """Bytes per second: a copy within the device (read and written), and each way over the link."""
    nbytes = (1 if small else 512) * MB
    here = torch.empty(nbytes, dtype=torch.uint8, device=timer.device)
    there = [torch.empty_like(here) for _ in range(2)]
    found = {
        "device_copy_bytes_per_s": 2
        * nbytes
        / timer.seconds([lambda other=other: other.copy_(here) for other in there])
    }
    pageable = torch.ones(nbytes, dtype=torch.uint8)
    found["link_pageable_bytes_per_s"] = nbytes / wall_seconds(timer, lambda: here.copy_(pageable))
    if timer.device.type != "cpu":
        locked = pageable.pin_memory()
        found["link_page_locked_bytes_per_s"] = nbytes / wall_seconds(
            timer, lambda: here.copy_(locked, non_blocking=True)
        )
        found["link_back_page_locked_bytes_per_s"] = nbytes / wall_seconds(
            timer, lambda: locked.copy_(here, non_blocking=True)
        )
    return found


def wall_seconds(timer: Timer, call: Callable[[], object]) -> float:
    call()
    taken = []
    for _ in range(timer.rounds):
        timer.synchronize()
        start = time.perf_counter()
        call()
        timer.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def blocks_of(format: Format, count: int, device: torch.device) -> torch.Tensor:
    """So many blocks, a few thousand different ones over and over."""
    some = torch.from_numpy(ggml_blocks.random_blocks(format, min(count, 4096), "ordinary")).to(device)
    return some.repeat(-(-count // len(some)), 1)[:count].contiguous()


def measure_type(
    format: Format, shape: tuple[int, int], dtype: torch.dtype, timer: Timer, copy_bytes_per_s: float
) -> dict[str, Any]:
    elements = shape[0] * shape[1]
    packed_bytes = format.packed_bytes(elements)
    traffic = packed_bytes + elements * dtype.itemsize
    packed = blocks_of(format, elements // format.block_elements, timer.device)
    packs = [packed, *(packed.clone() for _ in range(timer.sets(traffic) - 1))]
    outs = [torch.empty(elements, dtype=dtype, device=timer.device) for _ in packs]
    row: dict[str, Any] = {"shape": shape, "bytes": traffic}

    def unpack_all(kernel: kernels.Choice) -> list[Callable[[], object]]:
        kernels.choose(kernel)
        return [lambda p=p, o=o: unpack(format, p, o) for p, o in zip(packs, outs, strict=True)]

    def note(name: str, seconds: float) -> None:
        row[f"{name}_s"] = seconds
        row[f"{name}_bytes_per_s"] = traffic / seconds
        row[f"{name}_of_copy"] = traffic / seconds / copy_bytes_per_s

    note("torch", timer.seconds(unpack_all("Torch")))
    if kernels.why_not_triton(timer.device.type) is None and kernels.load(format) is not None:
        expected = outs[0].clone()
        outs[0].zero_()
        calls = unpack_all("Triton")
        note("triton", timer.seconds(calls))
        row["triton_host_s"] = timer.host_seconds(calls)
        row["triton_same_bits"] = torch.equal(outs[0], expected)
        row["triton_times_faster_than_torch"] = row["torch_s"] / row["triton_s"]
    if kernels.has_product(format, timer.device):
        row["product"] = measure_product(format, packs, shape, dtype, timer, copy_bytes_per_s)
    if format.name in CHAINS:
        chain = CHAINS[format.name]
        values = outs[0].float()
        difference = chain(packs[0], torch.float16).view(-1).float() - values
        row["chain_difference"] = float(difference.abs().max() / values.abs().max())
        note("chain", timer.seconds([lambda p=p: chain(p, dtype) for p in packs]))
        if "triton_s" in row:
            row["triton_times_faster_than_chain"] = row["chain_s"] / row["triton_s"]
    return row


def measure_product(
    format: Format,
    packs: list[torch.Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    timer: Timer,
    copy_bytes_per_s: float,
) -> dict[str, float]:
    """One token times the packed weight, beside unpacking it first and beside a dense weight."""
    x = torch.randn((1, shape[1]), device=timer.device).to(dtype)
    weights = [PackedTensor(packed.view(shape[0], -1), format, shape, dtype=dtype) for packed in packs]
    dense = [weights[0].dequantize() for _ in weights]
    linear = torch.nn.functional.linear
    kernels.choose("Triton")
    fused_s = timer.seconds([lambda w=w: multiply.product(w, x, None) for w in weights])
    unpacked_s = timer.seconds(
        [lambda w=w, o=o: linear(x, w.dequantize(out=o)) for w, o in zip(weights, dense, strict=True)]
    )
    return {
        "fused_s": fused_s,
        "unpacked_s": unpacked_s,
        "dense_s": timer.seconds([lambda w=w: linear(x, w) for w in dense]),
        "fused_of_copy": format.packed_bytes(shape[0] * shape[1]) / fused_s / copy_bytes_per_s,
        "times_faster_than_unpacked": unpacked_s / fused_s,
    }


def step_times(device: torch.device, small: bool, path: Path) -> None:
    """Steps of a model of Flux's sizes, with all of the memory and with less, by a program of its own."""
    options = ["--hidden", "256", "--sides", "16", "--shares", "25", "--steps", "1"]
    if not small:
        options = ["--hidden", "3072", "--sides", "1024", "--limit-gb", "6,8,12"]
    command = [sys.executable, str(ROOT / "benchmarks" / "step_times.py"), "--device", str(device)]
    subprocess.run([*command, *options, "--json", str(path)], check=True)


def line_of(name: str, row: dict[str, Any]) -> str:
    parts = [f"{name:<8} {'x'.join(map(str, row['shape'])):<12}"]
    for what in ("triton", "torch", "chain"):
        if f"{what}_s" in row:
            rate, share = row[f"{what}_bytes_per_s"] / 1e9, row[f"{what}_of_copy"]
            parts.append(f"{what} {row[f'{what}_s'] * 1e6:9.1f} us {rate:7.1f} GB/s {share:5.1%}")
    if "triton_times_faster_than_chain" in row:
        parts.append(f"{row['triton_times_faster_than_chain']:.1f} x the chain")
    if "product" in row:
        product = row["product"]
        parts.append(
            f"one token {product['fused_s'] * 1e6:.1f} us {product['fused_of_copy']:.1%}, "
            f"{product['times_faster_than_unpacked']:.1f} x unpacking first"
        )
    if row.get("triton_same_bits") is False:
        parts.append("OTHER BITS")
    return ", ".join(parts)


def environment(device: torch.device) -> dict[str, Any]:
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
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--types", help="a list of GGML types with commas; all of them by default")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--small", action="store_true", help="a quick run with tiny tensors")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    names = arguments.types.split(",") if arguments.types else list(FORMATS)
    timer = Timer(device, arguments.small)

    result: dict[str, Any] = {"environment": environment(device), "dtype": arguments.dtype}
    print(json.dumps(result["environment"]))
    result["ceilings"] = ceilings(timer, arguments.small)
    for name, rate in result["ceilings"].items():
        print(f"{name:<34} {rate / 1e9:8.1f} GB/s")
    copy_bytes_per_s = result["ceilings"]["device_copy_bytes_per_s"]
    result["unpack"] = {}
    for name in names:
        format = FORMATS[name]
        if format.unpack is None or format.dtype is not None:
            continue
        rows = result["unpack"][name] = []
        for shape in SMALL_SHAPES if arguments.small else FLUX_SHAPES:
            rows.append(measure_type(format, shape, dtype, timer, copy_bytes_per_s))
            print(line_of(name, rows[-1]), flush=True)
    slug = re.sub(r"\W+", "_", result["environment"]["name"]).strip("_").lower()
    path = arguments.json or ROOT / "benchmarks" / "results" / f"gpu_{slug}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}", flush=True)
    step_times(device, arguments.small, path.with_name(f"{path.stem}_steps.json"))


if __name__ == "__main__":
    main()

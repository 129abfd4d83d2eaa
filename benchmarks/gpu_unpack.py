"""Unpacking of every type at Flux's layer sizes: QSwap's kernels, its torch operations, and the chain of
torch operations that other programs use; and one token times a packed weight."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import ggml_blocks
import torch
from gpu_timer import Timer
from torch_chains import CHAINS

from lib_qswap.quant import kernels, multiply
from lib_qswap.quant.formats import FORMATS, Format
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.quant.unpack import unpack

# Flux: projections, MLP up and down, qkv, modulation, a single block's linear2.
FLUX_SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288), (9216, 3072), (18432, 3072), (3072, 15360))
SMALL_SHAPES = ((64, 512), (512, 256))

TYPES = sorted(
    (row.name for row in FORMATS.values() if row.unpack is not None and row.dtype is None),
    key=lambda name: name not in CHAINS,
)
"""Every type of blocks; those that are compared with the chains come first, where time runs out."""

Row = dict[str, Any]


def unpacking(
    types: Sequence[str],
    dtype: torch.dtype,
    timer: Timer,
    copy_bytes_per_s: float,
    small: bool,
    end_s: float,
    on_row: Callable[[str, Row], None],
) -> list[str]:
    """Calls `on_row` with a type and what it takes at one shape, for all types and shapes.

    end_s: on time.monotonic(). Returns the types that had not begun by then.
    """
    for position, name in enumerate(types):
        if time.monotonic() >= end_s:
            return list(types[position:])
        for shape in SMALL_SHAPES if small else FLUX_SHAPES:
            try:
                row = measure_type(FORMATS[name], shape, dtype, timer, copy_bytes_per_s)
            except torch.cuda.OutOfMemoryError:
                row = {"shape": shape, "error": "out of device memory"}
            on_row(name, row)
    return []


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
    row["same_size_copy_bytes_per_s"] = small_copy_bytes_per_s(timer, traffic)

    def unpack_all(kernel: kernels.Choice) -> list[Callable[[], object]]:
        kernels.choose(kernel)
        return [lambda p=p, o=o: unpack(format, p, o) for p, o in zip(packs, outs, strict=True)]

    def note(name: str, seconds: float) -> None:
        row[f"{name}_s"] = seconds
        row[f"{name}_bytes_per_s"] = traffic / seconds
        row[f"{name}_of_copy"] = traffic / seconds / copy_bytes_per_s
        row[f"{name}_of_same_size_copy"] = traffic / seconds / row["same_size_copy_bytes_per_s"]

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


@functools.lru_cache(maxsize=64)
def small_copy_bytes_per_s(timer: Timer, traffic: int) -> float:
    """Of copies that read and write so many bytes together: on a fast GPU these take a few microseconds, of
    which it needs some to begin and to end."""
    sources = [
        torch.ones(traffic // 2, dtype=torch.uint8, device=timer.device) for _ in range(timer.sets(traffic))
    ]
    pairs = [(source, torch.empty_like(source)) for source in sources]
    copies = [lambda source=source, target=target: target.copy_(source) for source, target in pairs]
    return traffic / timer.seconds(copies)


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


def line_of(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{name:<8} {'x'.join(map(str, row['shape'])):<12}, {row['error']}"
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

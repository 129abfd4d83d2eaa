"""`qswap bench dequant`: QSwap's unpacking beside its peers' and beside a copy, interleaved in one run."""

from __future__ import annotations

import ctypes
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib_qswap.quant.formats import FORMATS, Format
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.standalone.demo_file import BLOCKS, quantized_weight
from lib_qswap.swap.device import device_of

WEIGHT_SHAPE = (3072, 12288)
DTYPE = torch.float16
REPEATS = 5
THREADS = (1, 2)

TYPES = tuple(
    row.name
    for row in FORMATS.values()
    if row.unpack is not None and row.dtype is None and row.ggml_id is not None
)
"""Every GGML type of blocks."""

Run = Callable[[], object]
Peer = Callable[["Weight"], Run | None]
"""What unpacks a weight once; None for a type that the peer does not have."""


@dataclass(frozen=True)
class Weight:
    """packed: uint8 (rows, bytes of a row), on the measured device. out: fp16 (rows, elements of a row)."""

    format: Format
    packed: Tensor
    out: Tensor


def measure(types: Sequence[str], peers: Mapping[str, Peer], device: torch.device) -> dict[str, Any]:
    """Seconds of QSwap's unpacking to fp16, a copy of that, and the peers, for each type and thread count.

    There are thread counts on the CPU only.
    """
    ways: dict[str, Peer] = {"qswap": _qswap, "copy": _copy, **peers}
    rows = []
    for name in types:
        packed = _weight(name).to(device)
        weight = Weight(FORMATS[name], packed, torch.empty(WEIGHT_SHAPE, dtype=DTYPE, device=device))
        runs = {way: run for way, prepare in ways.items() if (run := prepare(weight)) is not None}
        for threads in THREADS if device.type == "cpu" else (None,):
            with _threads(threads):
                seconds = _interleaved(runs, device_of(device).synchronize)
            rows.append(
                {
                    "type": name,
                    "threads": threads,
                    "fastest_s": {way: min(taken) for way, taken in seconds.items()},
                    "median_s": {way: statistics.median(taken) for way, taken in seconds.items()},
                }
            )
    return {"dtype": str(DTYPE), "shape": list(WEIGHT_SHAPE), "repeats": REPEATS, "rows": rows}


def table(result: dict[str, Any]) -> list[str]:
    """The fastest run of each way, in ms, and how many times as long as QSwap's its peers' took."""
    ways = list(dict.fromkeys(way for row in result["rows"] for way in row["fastest_s"]))
    lines = [
        f"{'x'.join(map(str, result['shape']))} to {result['dtype'].removeprefix('torch.')}, "
        f"fastest of {result['repeats']} interleaved runs: ms (times QSwap's)",
        f"{'type':<8}{'threads':>8}" + "".join(f"{way:>17}" for way in ways),
    ]
    for row in result["rows"]:
        ours = row["fastest_s"]["qswap"]
        cells = []
        for way in ways:
            seconds = row["fastest_s"].get(way)
            ratio = "" if seconds is None or way == "qswap" else f" ({seconds / ours:5.2f})"
            cells.append(f"{'-' if seconds is None else f'{seconds * 1e3:.1f}{ratio}':>17}")
        lines.append(f"{row['type']:<8}{row['threads'] or '-':>8}" + "".join(cells))
    return lines


def _weight(name: str) -> Tensor:
    """A random weight's packed bytes, with scales that weights have where the demo knows how to make them."""
    if name in BLOCKS:
        return quantized_weight(name, WEIGHT_SHAPE)
    rows, elements = WEIGHT_SHAPE
    # Bytes from 1 to 63 make every scale of every other type finite and, as in a model's weights, not zero.
    row_bytes = FORMATS[name].packed_bytes(elements)
    return torch.from_numpy(np.random.default_rng(0).integers(1, 64, (rows, row_bytes), np.uint8))


def _interleaved(runs: dict[str, Run], synchronize: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of REPEATS turns, each of all ways one after the other; after a turn that warms up."""
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for turn in range(REPEATS + 1):
        for way, run in runs.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if turn:
                seconds[way].append(time.perf_counter() - start)
    return seconds


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- What is measured ----------------------------------------------------------------------------------------


def _qswap(weight: Weight) -> Run:
    packed = PackedTensor(weight.packed, weight.format, WEIGHT_SHAPE, dtype=weight.out.dtype)
    return lambda: packed.dequantize(out=weight.out)


def _copy(weight: Weight) -> Run:
    """Of the unpacked weight: its bytes read once and written once."""
    source = torch.zeros_like(weight.out)
    return lambda: weight.out.copy_(source)


def find_peers(comfyui_gguf: Path | None, ggml: Path | None, device: torch.device) -> dict[str, Peer]:
    """Peers by name: gguf-py and diffusers where they are installed; the others by their paths.

    comfyui_gguf: a checkout of ComfyUI-GGUF. ggml: ggml's base library, as llama.cpp builds it
    (libggml-base.so); for the CPU only. Raises ValueError for a path that does not serve.
    """
    peers: dict[str, Peer] = {}
    if importlib.util.find_spec("gguf") is not None:
        peers["gguf-py"] = _gguf_py
    try:
        from diffusers.quantizers.gguf import utils as diffusers_gguf
    except Exception:  # absent, or a broken installation, which raises whatever it likes
        diffusers_gguf = None  # type: ignore[assignment]
    if hasattr(diffusers_gguf, "dequantize_functions"):
        peers["diffusers"] = _Diffusers(diffusers_gguf)
    if comfyui_gguf is not None:
        peers["ComfyUI-GGUF"] = _ComfyUI(_module_of_file(comfyui_gguf / "dequant.py"))
    if ggml is not None:
        if device.type != "cpu":
            raise ValueError(f"{ggml} computes on the CPU, beside nothing on {device}: add --device cpu")
        peers["ggml C"] = _GgmlC(ggml)
    return peers


def _gguf_py(weight: Weight) -> Run | None:
    """numpy, on the CPU, in one thread; to fp32."""
    import gguf

    packed = weight.packed.cpu().numpy()
    try:
        kind = gguf.GGMLQuantizationType[weight.format.name]
        gguf.quants.dequantize(packed[:1], kind)
    except (KeyError, NotImplementedError):
        return None
    return lambda: gguf.quants.dequantize(packed, kind)


def _served_kind(weight: Weight, module: ModuleType) -> Any:
    """gguf-py's name for the type of `weight`, None where `module`, diffusers' or ComfyUI's, has no function
    for it."""
    import gguf

    kind = getattr(gguf.GGMLQuantizationType, weight.format.name, None)
    return kind if kind in module.dequantize_functions else None


class _Diffusers:
    """What its GGUF linear layer does before its product."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __call__(self, weight: Weight) -> Run | None:
        kind = _served_kind(weight, self.module)
        if kind is None:
            return None
        parameter = self.module.GGUFParameter(weight.packed, quant_type=kind)
        return lambda: self.module.dequantize_gguf_tensor(parameter).to(weight.out.dtype)


class _ComfyUI:
    """What its layers do with a weight that has no LoRA, with their default settings."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __call__(self, weight: Weight) -> Run | None:
        kind = _served_kind(weight, self.module)
        if kind is None:
            return None
        dtype = weight.out.dtype
        return lambda: self.module.dequantize(weight.packed, kind, WEIGHT_SHAPE).to(dtype)


class _GgmlC:
    """ggml's reference functions, `dequantize_row_q4_K` and so on, to fp32; threads share the rows."""

    def __init__(self, path: Path) -> None:
        try:
            self.library = ctypes.CDLL(str(path))
        except OSError as error:
            raise ValueError(f"{path} cannot be loaded: {error}") from None

    def __call__(self, weight: Weight) -> Run | None:
        name = "dequantize_row_" + weight.format.name.lower().replace("_k", "_K")
        function = getattr(self.library, name, None)
        if function is None:
            return None
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        function.restype = None
        values = torch.empty(WEIGHT_SHAPE)
        pool = ThreadPoolExecutor(max(THREADS))  # ctypes lets go of the interpreter's lock

        def run() -> Tensor:
            rows = -(-WEIGHT_SHAPE[0] // torch.get_num_threads())
            parts = zip(weight.packed.split(rows), values.split(rows), strict=True)
            calls = [
                pool.submit(function, packed.data_ptr(), out.data_ptr(), out.numel()) for packed, out in parts
            ]
            for call in calls:
                call.result()
            return values

        return run


def _module_of_file(path: Path) -> ModuleType:
    """Raises ValueError when it cannot be imported."""
    spec = importlib.util.spec_from_file_location("comfyui_gguf_dequant", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{path.parent} is no checkout of ComfyUI-GGUF: there is no {path.name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(f"{path} needs {error.name}") from None
    return module

"""What a run takes, measured from outside the model: RAM, device memory, how fast masters can be read, and
bytes that come down from a device."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib_qswap.quant.packed import PackedTensor
from lib_qswap.swap.copier import STAGING_BUFFER_BYTES
from lib_qswap.swap.reader import Reader, Reading, numbers_of_threads

if TYPE_CHECKING:
    from lib_qswap.swap.layer import Layer

_MOST_READ_BYTES = 1 << 30
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class DownloadCounter(TorchDispatchMode):
    """Counts, while it is entered, the bytes that tensor operations of this thread copy from a device to the
    host.

    Attributes:
        nbytes: so far. Stays 0 where the CPU is the device: there is no way down.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _COPIES:
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device.type != "cpu" and out.device.type == "cpu":
                self.nbytes += source.packed_nbytes if isinstance(source, PackedTensor) else source.nbytes
        return out


def peak_rss_bytes() -> int:
    """The most RAM that this process has had resident so far, file pages that it mapped included."""
    if sys.platform == "win32":
        return _memory_counters().peak_working_set
    if sys.platform == "linux":
        # Not getrusage, whose peak a process takes over from the one that started it.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def rss_bytes() -> int | None:
    """RAM that this process has now, without pages of files; on Windows what is its own, paged out or not.
    None: not known."""
    if sys.platform == "win32":
        return _memory_counters().private
    if sys.platform != "linux":
        return None
    with contextlib.suppress(AttributeError):  # glibc's heap keeps what was freed.
        ctypes.CDLL(None).malloc_trim(0)
    _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - of_files) * mmap.PAGESIZE


def _memory_counters() -> Any:
    class Counters(ctypes.Structure):  # PROCESS_MEMORY_COUNTERS_EX
        _fields_ = (
            ("nbytes", ctypes.c_uint32),
            ("page_faults", ctypes.c_uint32),
            ("peak_working_set", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 7),
            ("private", ctypes.c_size_t),
        )

    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.K32GetProcessMemoryInfo.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
    counters = Counters(nbytes=ctypes.sizeof(Counters))
    kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.nbytes)
    return counters


def peak_device_bytes(device: torch.device) -> int | None:
    """The most that tensors have had on the device since `reset_peak_device_bytes`, with what was freed while
    the device still had to use it: who lets the host run ahead fills the memory with it. None: not known."""
    statistics = getattr(getattr(torch, device.type, None), "memory_stats", None)
    return None if statistics is None else statistics()["active_bytes.all.peak"]


def reset_peak_device_bytes(device: torch.device) -> None:
    reset = getattr(getattr(torch, device.type, None), "reset_peak_memory_stats", None)
    if reset is not None:
        reset()


def read_bytes_per_s(layers: Sequence[Layer]) -> float | None:
    """How fast the masters of `layers` are read into a small buffer, by the number of threads that is fastest
    here; None where the device reads all of them by itself, from page-locked memory."""
    if all(layer.home.page_locked for layer in layers):
        return None
    return max(_read_by(threads, layers) for threads in numbers_of_threads())


def _read_by(threads: int, layers: Sequence[Layer]) -> float:
    """Bytes per second, of the first gigabyte."""
    # Written to once: memory that nobody has had before comes page by page, which takes longer than reading.
    buffers = torch.ones((2 * threads, STAGING_BUFFER_BYTES), dtype=torch.uint8)
    reader = Reader(threads=threads)
    under_way: deque[Reading] = deque()
    nbytes, begun = 0, time.perf_counter()
    try:
        pieces = _pieces(layers, buffers.shape[1])
        for (layer, start), buffer in zip(pieces, itertools.cycle(buffers), strict=False):
            under_way.append(reader.begin(layer.home, buffer[: layer.payload_bytes - start], start))
            nbytes += under_way[-1].nbytes
            if len(under_way) == len(buffers):
                _finish(reader, under_way)
            if nbytes >= _MOST_READ_BYTES:
                break
        while under_way:
            _finish(reader, under_way)
        return nbytes / (time.perf_counter() - begun)
    finally:
        reader.close()


def _pieces(layers: Sequence[Layer], piece_bytes: int) -> Iterator[tuple[Layer, int]]:
    """(layer, where in its payload the piece begins)."""
    for layer in layers:
        for start in range(0, layer.payload_bytes, piece_bytes):
            yield layer, start


def _finish(reader: Reader, under_way: deque[Reading]) -> None:
    error = reader.finish(under_way.popleft())
    if error is not None:
        raise error

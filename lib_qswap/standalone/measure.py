"""What a run takes, measured from outside the model: peak RAM, and bytes that come down from a device."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib_qswap.quant.packed import PackedTensor

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
        return _peak_working_set_bytes()
    if sys.platform == "linux":
        # Not getrusage, whose peak a process takes over from the one that started it.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _peak_working_set_bytes() -> int:
    class Counters(ctypes.Structure):  # PROCESS_MEMORY_COUNTERS
        _fields_ = (
            ("nbytes", ctypes.c_uint32),
            ("page_faults", ctypes.c_uint32),
            ("peak_working_set", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 7),
        )

    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.K32GetProcessMemoryInfo.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
    counters = Counters(nbytes=ctypes.sizeof(Counters))
    kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.nbytes)
    return counters.peak_working_set

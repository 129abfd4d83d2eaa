"""What swapping needs of a device: streams, events, free memory and page-locking, the same calls for every
kind of device.

Kinds: *cuda* (NVIDIA, and AMD through ROCm), *xpu*, a simulated device with the same module (tests), *mps*
(one stream), *cpu* (the demo's device: its "device memory" is RAM, and a second thread takes the place of the
copy stream).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from lib_qswap.swap import direct_copy
from lib_qswap.swap.direct_copy import DirectCopy
from lib_qswap.swap.ram import available_ram_bytes, total_ram_bytes

T = TypeVar("T")

ALIGNMENT_BYTES = 256
"""Every part of a payload starts at a multiple of this: what CUDA's own allocator guarantees, and enough for
any vector load."""


def align(nbytes: int) -> int:
    """`nbytes` rounded up to `ALIGNMENT_BYTES`."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class HostEvent:
    """An event of a device with one queue: the point in time at which work was handed to it, on the CPU that
    at which it was done."""

    __slots__ = ("_at",)

    def __init__(self) -> None:
        self._at = 0.0

    def record(self, _stream: Any) -> None:
        self._at = time.perf_counter()

    def wait(self, _stream: Any) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, later: HostEvent) -> float:
        """Milliseconds from this event to `later`, as torch.cuda.Event.elapsed_time."""
        return (later._at - self._at) * 1e3


def has_module(device: torch.device) -> bool:
    """Whether torch has a module that drives devices of this kind: DirectML's have none."""
    return device.type in ("cpu", "meta") or getattr(torch, device.type, None) is not None


class Device:
    """One device and the torch module that drives it (torch.cuda, torch.xpu, …).

    Attributes:
        device: with an index, except for mps and cpu.
        streams: whether copies can run on a stream of their own.
    """

    def __init__(self, device: torch.device) -> None:
        module: Any = getattr(torch, device.type, None)
        if not has_module(device):
            raise ValueError(f"torch has no module for the device {device}")
        if device.type not in ("cpu", "mps") and device.index is None:
            device = torch.device(device.type, module.current_device())
        self.device = device
        self._module = module
        self.is_host = device.type == "cpu"
        self.streams = not self.is_host and hasattr(module, "Stream") and device.type != "mps"
        self._raw_stream = getattr(torch._C, f"_{device.type}_getCurrentRawStream", None)
        self._last_stream: tuple[int, Any] | None = None

    # ------------------------------------------------------------------------------------- streams and events
    def new_stream(self) -> Any:
        """A side stream, or None where the device has only one."""
        if not self.streams:
            return None
        with self._guard():
            return self._module.Stream(device=self.device)

    def current_stream(self) -> Any:
        """The stream that this thread's compute goes to; None where the device has only one."""
        if not self.streams:
            return None
        if self._raw_stream is None:
            return self._module.current_stream(self.device)
        # Asking for the number alone takes a tenth of the time; it is nearly always that of the last time.
        raw, last = self._raw_stream(self.device.index), self._last_stream
        if last is None or last[0] != raw:
            self._last_stream = last = raw, self._module.current_stream(self.device)
        return last[1]

    def on_stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Work issued inside goes to `stream` (None: to where it would go anyway)."""
        return contextlib.nullcontext() if stream is None else self._module.stream(stream)

    def issue_on(self, stream: Any, work: Callable[[T], object], argument: T) -> None:
        """Calls `work` inside `on_stream`, for a third of what that costs the host."""
        # Setting a stream sets its device as well: where another one is current, that has to come back.
        if stream is None or self._module.current_device() != self.device.index:
            with self.on_stream(stream):
                work(argument)
            return
        before = self.current_stream()
        self._module.set_stream(stream)
        try:
            work(argument)
        finally:
            self._module.set_stream(before)

    def direct_copy(self, stream: Any) -> DirectCopy | None:
        """How page-locked memory is copied to `stream` without torch, where that is possible."""
        if stream is None or self.device.type != "cuda":
            return None
        return direct_copy.find(_cuda_runtimes(), stream, self.device, self._module)

    @property
    def has_clock(self) -> bool:
        """Whether events tell how long the device took."""
        return self.is_host or self.streams

    def new_event(self, *, timing: bool = False) -> Any:
        # With one queue what is asked for first is done first; and Metal's own events can hang.
        if not self.streams:
            return HostEvent()
        return self._module.Event(enable_timing=timing)

    def order(self, first: Any, then: Any) -> None:
        """What is issued to stream `then` from now on runs after all that stream `first` has now."""
        if first is not None and then is not None and first != then:
            event = self.new_event()
            event.record(first)
            event.wait(then)

    def synchronize(self) -> None:
        """Waits for the device. Never on the hot path: only before host memory that it may be reading is
        released."""
        if not self.is_host:
            with self._guard():
                self._module.synchronize()

    def _guard(self) -> contextlib.AbstractContextManager[Any]:
        guard = getattr(self._module, "device", None)
        return guard(self.device) if guard is not None else contextlib.nullcontext()

    # ------------------------------------------------------------------------------------------------- memory
    def memory_bytes(self) -> tuple[int, int]:
        """(free, total) bytes. What torch's allocator keeps cached counts as free: the next allocation takes
        it from there."""
        if self.is_host:
            return available_ram_bytes(), total_ram_bytes()
        if self.device.type == "mps":
            recommended = getattr(self._module, "recommended_max_memory", None)  # torch 2.5
            total = recommended() if recommended is not None else total_ram_bytes() * 2 // 3
            return total - self._module.driver_allocated_memory(), total
        free, total = self._module.mem_get_info(self.device)
        cached = self._module.memory_reserved(self.device) - self._module.memory_allocated(self.device)
        return free + cached, total

    def allocated_bytes(self) -> int | None:
        """What tensors take on the device now; None where that is not known together with its peak."""
        return self._module.memory_allocated(self.device) if self._knows_peak else None

    def peak_allocated_bytes(self) -> int:
        """The most that tensors have taken at once. It is never set back here: others show it."""
        return self._module.max_memory_allocated(self.device)

    def allocation_retries(self) -> int:
        """How often torch's allocator found no room so far, waited for the device, gave back what it kept,
        and tried again; 0 where it does not count."""
        stats = getattr(self._module, "memory_stats_as_nested_dict", None)
        return 0 if stats is None or self.is_host else stats(self.device).get("num_alloc_retries", 0)

    @property
    def _knows_peak(self) -> bool:
        return not self.is_host and hasattr(self._module, "max_memory_allocated")

    def empty_cache(self) -> None:
        if not self.is_host:
            self._module.empty_cache()

    # ------------------------------------------------------------------------------------------- page-locking
    @property
    def can_register(self) -> bool:
        """Whether memory that exists already can be page-locked (cudaHostRegister and its like)."""
        return hasattr(self._module, "cudart")

    @property
    def can_page_lock(self) -> bool:
        return not self.is_host and self.device.type != "mps"

    def register(self, buffer: torch.Tensor) -> str | None:
        """Page-locks `buffer`'s memory where it is. Returns None when that worked, else why it did not."""
        with self._guard():
            code = int(self._module.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
        if code == 0:
            return None
        self._clear_error()
        return f"cudaHostRegister of {buffer.numel() / 2**20:.0f} MB was refused (error {code})"

    def unregister(self, address: int) -> None:
        with self._guard():
            if int(self._module.cudart().cudaHostUnregister(address)) != 0:
                self._clear_error()

    def _clear_error(self) -> None:
        """A refused registration leaves an error behind that the next kernel launch would report as its
        own."""
        for name in _cuda_runtimes():
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(name).cudaGetLastError()
                break
        # Where torch has a runtime built in, or is no CUDA: let some work that nobody needs report it.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.device).add_(1)
            self.synchronize()


def _cuda_runtimes() -> list[str]:
    """The files that torch has CUDA's runtime from: each keeps an error state of its own."""
    if not torch.version.cuda or not torch.cuda.is_available():
        return []
    major = torch.version.cuda.partition(".")[0]
    if sys.platform == "win32":
        return [f"cudart64_{major}.dll", f"cudart64_{major}0.dll"]
    return [f"libcudart.so.{major}", f"libcudart.so.{major}.0"]


_devices: dict[torch.device, Device] = {}


def device_of(device: torch.device | str) -> Device:
    """The one `Device` of a torch device."""
    found = Device(torch.device(device))
    return _devices.setdefault(found.device, found)

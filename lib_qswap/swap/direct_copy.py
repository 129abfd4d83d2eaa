"""Copies from page-locked memory by the function of CUDA's runtime that torch calls for them as well. What
torch does before it (it finds the kernel, sets a stream and sets it back, looks for the memory among what its
own allocator has page-locked) takes the host longer than the function itself."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any

import torch

_HOST_TO_DEVICE = 1  # cudaMemcpyHostToDevice
_TRIED_BYTES = 4096


class DirectCopy:
    """Enqueues copies to one stream of one device. It knows no lifetimes: source and target have to stay
    until the copy is done."""

    def __init__(self, runtime: Any, stream: Any, device: torch.device, module: Any) -> None:
        """runtime: CUDA's, as a library. module: torch's for that kind of device."""
        self._memcpy_async = runtime.cudaMemcpyAsync
        self._memcpy_async.restype = ctypes.c_int
        self._memcpy_async.argtypes = (
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_void_p,
        )
        self._take_error = runtime.cudaGetLastError
        self._stream = stream.cuda_stream
        self._index = device.index
        self._current_device = module.current_device
        self._failed = False

    def __call__(self, target: torch.Tensor, source: torch.Tensor, nbytes: int) -> bool:
        """Copies so many bytes from the beginning of `source`, which is page-locked, to that of `target`.

        Returns whether it did. Another way has to be taken where another device is the current one (the
        runtime would make a context on that one, if it has none), and for good once there was an error.
        """
        if self._failed or self._current_device() != self._index:
            return False
        error = self._memcpy_async(
            target.data_ptr(), source.data_ptr(), nbytes, _HOST_TO_DEVICE, self._stream
        )
        if error:
            self._failed = True
            self._take_error()  # Else the next kernel launch would report it as its own.
        return not error


def find(runtimes: Sequence[str], stream: Any, device: torch.device, module: Any) -> DirectCopy | None:
    """The way to `stream`, one of `device`, by the first of these files that is there, if it does what it
    should. It waits for the stream."""
    for name in runtimes:
        try:
            direct = DirectCopy(ctypes.CDLL(name), stream, device, module)
        except (OSError, AttributeError):
            continue
        with module.device(device), contextlib.suppress(RuntimeError):  # Memory may be refused.
            return direct if _works(direct, stream, device, module) else None
        return None
    return None


def _works(direct: DirectCopy, stream: Any, device: torch.device, module: Any) -> bool:
    with torch.inference_mode(False):
        # Not page-locked, which nobody has allowed yet, and no random numbers: they are the host's.
        source = torch.arange(_TRIED_BYTES, device="cpu").remainder_(251).to(torch.uint8)
        target = torch.zeros(_TRIED_BYTES, dtype=torch.uint8, device=device)
        stream.wait_stream(module.current_stream(device))
        copied = direct(target, source, _TRIED_BYTES)
        stream.synchronize()
        return copied and torch.equal(target.cpu(), source)

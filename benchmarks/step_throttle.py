"""A slower link than the device has.

After every copy to the device more bytes cross the link on the same stream, from a page-locked buffer of the
throttle's own: b bytes are followed by b x (link / wanted - 1). They take the time that the slower link would
have taken in addition, on the engine that copies, so that copies on several streams share the slower link as
they would, and compute runs beside them as before. From pageable memory a copy takes the time of its staging
in addition, as it does on any link. Copies back to the host are as fast as ever: steps make none that count.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lib_qswap.swap.device import Device
from lib_qswap.swap.direct_copy import DirectCopy

BUFFER_BYTES = 32 << 20


class Throttle:
    """While it is entered, copies by `Tensor.copy_` and `Tensor.to` to `device` have `wanted_bytes_per_s` of
    a link of `link_bytes_per_s`; a link that is slower stays what it is. It takes BUFFER_BYTES of device
    memory for each stream that copies, and as much page-locked memory."""

    def __init__(self, device: Device, link_bytes_per_s: float, wanted_bytes_per_s: float) -> None:
        self._device = device
        self._more = max(0.0, link_bytes_per_s / wanted_bytes_per_s - 1)
        self._source = torch.zeros(BUFFER_BYTES, dtype=torch.uint8).pin_memory()
        self._targets: dict[Any, Tensor] = {}
        self._lock = threading.Lock()
        # As the class has them: an instance's `copy_` would be bound.
        self._copy: Callable[..., Tensor] = torch.Tensor.copy_
        self._to: Callable[..., Tensor] = torch.Tensor.to
        self._direct = DirectCopy.__call__

    def __enter__(self) -> Throttle:
        throttle, copy, to = self, self._copy, self._to

        def copy_(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
            result = copy(self, src, non_blocking)
            throttle._after(src, self, non_blocking)
            return result

        def to_(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result = to(self, *args, **kwargs)
            if self.device != result.device:
                # The parser is modules', and does not know `copy`, the fourth.
                kwargs.pop("copy", None)
                throttle._after(self, result, torch._C._nn._parse_to(*args[:3], **kwargs)[2])
            return result

        torch.Tensor.copy_, torch.Tensor.to = copy_, to_
        DirectCopy.__call__ = lambda *_: False
        return self

    def __exit__(self, *_: object) -> None:
        del torch.Tensor.copy_, torch.Tensor.to  # Its base class has them.
        DirectCopy.__call__ = self._direct

    def _after(self, source: Tensor, copied: Tensor, non_blocking: bool) -> None:
        """Lets the bytes that a copy still owes cross the link. Its caller waits for them where it would have
        waited for the copy."""
        # What a tensor subclass is made of is copied by itself.
        if source.device.type != "cpu" or copied.device.type != self._device.device.type:
            return
        if hasattr(source, "__tensor_flatten__") or hasattr(copied, "__tensor_flatten__"):
            return
        owed = round(copied.nbytes * self._more)
        stream = self._device.current_stream()
        target = self._target(stream)
        while owed > 0:
            nbytes = min(owed, BUFFER_BYTES)
            self._copy(target[:nbytes], self._source[:nbytes], True)
            owed -= nbytes
        if not (non_blocking and source.is_pinned()):
            stream.synchronize()

    def _target(self, stream: Any) -> Tensor:
        # One for each stream: two copies at once would write to the same bytes.
        with self._lock:
            if stream not in self._targets:
                self._targets[stream] = torch.empty(
                    BUFFER_BYTES, dtype=torch.uint8, device=self._device.device
                )
            return self._targets[stream]

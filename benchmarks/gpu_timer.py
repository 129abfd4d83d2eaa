"""Times of single operations on a device, without the host's part in them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from lib_qswap.swap.device import device_of

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

    def seconds(self, calls: list[Callable[[], object]], *, graph: bool = True) -> float:
        """graph: whether to issue them as one, where the device can."""
        for call in calls:
            call()
        self.synchronize()
        graph = graph and self.device.type == "cuda"
        run = self._graph(calls) if graph else lambda: [call() for call in calls]
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

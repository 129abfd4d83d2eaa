"""What the swap engine costs the host for each layer: the time in which a step is issued, on layers so small
and so few that nothing is waited for."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from step_models import PackedLinear
from torch import Tensor, nn

from lib_qswap.quant.formats import FORMATS
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.standalone.demo_file import quantized_weight
from lib_qswap.swap.device import Device, device_of
from lib_qswap.swap.device_state import state_of
from lib_qswap.swap.execute import Scratch
from lib_qswap.swap.manager import attach

WIDTH = 256
TOKENS = 16
LAYERS, SMALL_LAYERS = 60, 20
"""A swapped layer is about ten commands, and CUDA's queue has room for about a thousand: a host that goes on
issuing waits for the device, which takes longer than the host for layers with a copy each."""
ROUNDS, SMALL_ROUNDS = 100, 5
RING_LAYERS = 8
"""In the budget with which layers are swapped, so few that each has a copy of its own; a few of them become
resident."""
TOGETHER_SHARE = 0.6
"""Of the layers, as much as the ring that lets several come in one copy."""

Row = dict[str, Any]


def host_times(device: torch.device, small: bool) -> Row:
    """Seconds of the host for each layer: plain, with packed weights that are on the device and unpacked by
    the same kernels; the same layers under QSwap, resident and swapped from page-locked memory, each in a
    copy of its own (`swapped_s`) and several in one (`together_s`), and both once more where torch issues
    copies that QSwap would issue by itself (`by_torch_swapped_s`, `by_torch_together_s`). `until_done_s`: for
    each layer of a step with swapped ones, until the device has done it too. `calls_s`: what the calls take
    that a swapped layer is made of."""
    layers, rounds = (SMALL_LAYERS, SMALL_ROUNDS) if small else (LAYERS, ROUNDS)
    dtype = torch.bfloat16
    format = FORMATS["Q8_0"]
    packed = PackedTensor(quantized_weight("Q8_0", (WIDTH, WIDTH)), format, (WIDTH, WIDTH), dtype=dtype)
    driver = device_of(device)
    x = torch.randn((TOKENS, WIDTH), device=device).to(dtype)

    scratch = Scratch(driver)
    plain = nn.Sequential(*(PackedLinear(packed, None, scratch) for _ in range(layers))).to(device)
    times: Row = {"layers": layers, "plain_s": _seconds(driver, plain, x, rounds)[0] / layers}

    linear = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
    linear.weight = nn.Parameter(packed, requires_grad=False)
    copier = state_of(driver).copier
    direct = copier.direct
    for way in ("", "by_torch_") if direct is not None else ("",):
        copier.direct = None if way else direct
        for name, ring_layers in (("swapped", None), ("together", int(layers * TOGETHER_SHARE))):
            model = nn.Sequential(*(copy.deepcopy(linear) for _ in range(layers)))
            attachment = attach(
                model,
                device=device,
                location="shared",
                budget_bytes=1 << 40,
                compute_dtype=dtype,
                ring_bytes=ring_layers and ring_layers * packed.packed_nbytes,
                name="host",
            )
            if "resident_s" not in times:
                times["resident_s"] = _seconds(driver, model, x, rounds)[0] / layers
            beside = attachment.fixed_bytes + attachment.scratch_bytes
            attachment.rebalance(beside + (ring_layers or RING_LAYERS) * packed.packed_nbytes)
            taken_s, done_s = _seconds(driver, model, x, rounds)
            swapped = sum(layer.resident is None for layer in attachment.layers)
            times[f"{way}{name}_layers"] = swapped
            times[f"{way}{name}_s"] = (taken_s - (layers - swapped) * times["resident_s"]) / swapped
            times.setdefault("until_done_s", done_s / layers)
            attachment.detach()
    copier.direct = direct
    times["calls_s"] = _call_times(driver, rounds)
    # What is measured first in a process can come out half as large again.
    times["plain_s"] = min(times["plain_s"], _seconds(driver, plain, x, rounds)[0] / layers)
    return times


def _call_times(driver: Device, rounds: int) -> dict[str, float]:
    """Seconds of the host for one call, among as many as a step of LAYERS makes."""
    stream, copier = driver.current_stream(), state_of(driver).copier
    target = torch.empty(WIDTH * WIDTH, dtype=torch.uint8, device=driver.device)
    source = torch.empty(WIDTH * WIDTH, dtype=torch.uint8)
    source = source.pin_memory() if driver.can_page_lock else source
    event, timed = driver.new_event(), driver.new_event(timing=True)
    timed.record(stream)

    def copy_(_: object = None) -> None:
        target.copy_(source, non_blocking=True)

    calls: dict[str, Callable[[], object]] = {
        "record": lambda: event.record(stream),
        "record_timed": lambda: timed.record(stream),
        "wait": lambda: timed.wait(copier.stream),
        "on_stream": lambda: driver.issue_on(copier.stream, lambda _: None, None),
        "copy": copy_,
        "copy_on_stream": lambda: driver.issue_on(copier.stream, copy_, None),
    }
    if (direct := copier.direct) is not None:
        calls["copy_directly"] = lambda: direct(target, source, source.numel())
    found = {}
    for name, call in calls.items():
        taken = []
        for _ in range(rounds):
            driver.synchronize()
            begun = time.perf_counter()
            for _ in range(LAYERS):
                call()
            taken.append((time.perf_counter() - begun) / LAYERS)
        found[name] = statistics.median(taken)
    driver.synchronize()
    return found


@torch.no_grad()
def _seconds(driver: Device, model: nn.Module, x: Tensor, rounds: int) -> tuple[float, float]:
    """Medians of the times in which the host issues one forward to an idle device, when plans are made, and
    in which the device has done it."""
    issued, done = [], []
    for _ in range(2 * rounds):
        driver.synchronize()
        begun = time.perf_counter()
        model(x)
        issued.append(time.perf_counter() - begun)
        driver.synchronize()
        done.append(time.perf_counter() - begun)
    return statistics.median(issued[rounds:]), statistics.median(done[rounds:])

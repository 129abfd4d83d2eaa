"""The simulated accelerator: its interface, the order of its work, its hazards, and the CPU's arithmetic."""

import copy
import gc
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.simgpu

timed = pytest.mark.flaky(reruns=5, reruns_delay=1)
"""Measures time, which other programs on the machine take as well: once is enough."""

MB = 1 << 20
DEV = "simgpu"  # a name, not a torch.device: the backend has it only once the simgpu fixture has loaded it
RACES = ("race_read_after_write", "race_write_after_read", "race_write_after_write")
LATE = 2.0  # seconds: what comes after that did not come; less would fail on a busy machine
SETTINGS = {
    "total": 4096 * MB,
    "h2d": 1e9,
    "d2h": 1e9,
    "pageable": 0.5e9,
    "latency": 0,
    "pin_limit": -1,
    "op_seconds": 0,
    "op_factor": 1,
    "poison": 0xC5,
    "async_compute": False,
    "cache_counts": False,
    "strict": True,
    "pin_pow2": False,
    "virtual_time": False,
}


@pytest.fixture(autouse=True)
def sim(simgpu):
    """A reset device, as conftest's, but hazards are what many of these tests are about."""
    gc.collect()
    torch.simgpu.set_stream(torch.simgpu.default_stream())
    simgpu.reset()
    torch.simgpu.empty_cache()
    with simgpu.settings(**SETTINGS):
        yield simgpu
        gc.collect()
        simgpu.reset()


def pin(n, v=1.0):
    return torch.full((n,), float(v)).pin_memory()


def races(sim):
    h = sim.hazards()
    return sum(h[k] for k in RACES)


def clock(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t


# ---- the interface
def test_device_module_has_the_interface_of_torch_cuda():
    assert torch.simgpu is torch.get_device_module(DEV)
    assert torch.simgpu.is_available()
    assert torch.simgpu.device_count() == 1
    assert torch.simgpu.current_device() == 0
    torch.simgpu.set_device(0)
    p = torch.simgpu.get_device_properties(DEV)
    assert p.total_memory == 4096 * MB
    assert p.name
    assert torch.device("simgpu:0").type == "simgpu"
    assert torch.simgpu.OutOfMemoryError is torch.OutOfMemoryError
    assert isinstance(torch.simgpu.current_stream(), torch.simgpu.Stream)
    assert torch.simgpu.current_stream() == torch.simgpu.default_stream()
    s = torch.simgpu.Stream(device=DEV, priority=-1)
    assert isinstance(s, torch.Stream)
    with torch.simgpu.stream(s) as t:
        assert torch.simgpu.current_stream() == s == t
        with torch.simgpu.stream(None):
            assert torch.simgpu.current_stream() == s
    assert torch.simgpu.current_stream() == torch.simgpu.default_stream()
    with s:
        assert torch.simgpu.current_stream() == s
    assert torch.simgpu.current_stream() == torch.simgpu.default_stream()
    seen = []
    with torch.simgpu.stream(s):  # the current stream is a matter of the thread
        th = threading.Thread(target=lambda: seen.append(torch.simgpu.current_stream()))
        th.start()
        th.join()
    assert seen[0] == torch.simgpu.default_stream()


def test_generic_torch_stream_event_and_accelerator_work(sim):
    s = torch.Stream(device="simgpu")
    e = torch.Event(device="simgpu", enable_timing=True)
    e2 = torch.Event(device="simgpu", enable_timing=True)
    e.record(s)
    with s:
        sim.busy(0.05)
    e2.record(s)
    assert not e2.query()
    e2.synchronize()
    assert e2.query()
    assert 45 < e.elapsed_time(e2) < LATE * 1e3
    a = torch.accelerator
    assert a.is_available()
    assert a.current_accelerator().type == "simgpu"
    assert a.current_stream() == torch.simgpu.default_stream()
    assert a.device_count() == 1
    x = torch.empty(MB, dtype=torch.uint8, device=DEV)
    assert a.memory_allocated() >= MB
    assert a.max_memory_allocated() >= MB
    assert a.memory_reserved() >= MB
    free, total = a.get_memory_info()
    assert total == 4096 * MB
    assert free == total - a.memory_allocated()
    a.synchronize()
    a.empty_cache()
    a.reset_peak_memory_stats()
    assert a.device_index(0) is not None
    assert x is not None


def test_memory_counters_follow_allocations(sim):
    base = torch.simgpu.memory_allocated()
    free0, total = torch.simgpu.mem_get_info()
    x = torch.empty(10 * MB, dtype=torch.uint8, device=DEV)
    assert torch.simgpu.memory_allocated() == base + 10 * MB
    assert torch.simgpu.mem_get_info() == (
        free0 - 10 * MB,
        total,
    )
    del x
    assert torch.simgpu.memory_allocated() == base
    assert torch.simgpu.max_memory_allocated() >= base + 10 * MB
    torch.simgpu.reset_peak_memory_stats()
    assert torch.simgpu.max_memory_allocated() == base == sim.stats()["peak_device_bytes"]
    assert torch.simgpu.memory_stats()["allocated_bytes.all.current"] == base
    torch.simgpu.empty_cache()


def test_allocation_beyond_the_capacity_raises_and_memory_can_be_had_again(sim):
    sim.set_total(100 * MB + torch.simgpu.memory_allocated())
    a = torch.empty(60 * MB, dtype=torch.uint8, device=DEV)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory\. Tried to allocate 60 MiB"):
        torch.empty(60 * MB, dtype=torch.uint8, device=DEV)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.ones(60 * MB, dtype=torch.uint8).to(DEV)
    del a
    torch.empty(60 * MB, dtype=torch.uint8, device=DEV)


# ---- streams are real
@timed
def test_pinned_copy_on_side_stream_returns_at_once_and_runs_later():
    src, dst, s = (
        pin(25 * MB),
        torch.zeros(25 * MB, device=DEV),
        torch.simgpu.Stream(),
    )  # 100 MB at 1 GB/s: 0.105 s
    with torch.simgpu.stream(s):
        t = clock(lambda: dst.copy_(src, non_blocking=True))
    assert t < 0.04
    assert not s.query()
    assert dst[-1].item() == 0
    t = clock(s.synchronize)
    assert 0.05 < t < LATE
    assert s.query()
    assert dst[-1].item() == 1


@timed
def test_pageable_copy_blocks_the_caller_at_its_own_bandwidth(sim):
    src, dst, s = torch.ones(10 * MB), torch.zeros(10 * MB, device=DEV), torch.simgpu.Stream()
    with torch.simgpu.stream(s):
        t = clock(lambda: dst.copy_(src, non_blocking=True))
    assert 0.075 < t < LATE
    assert dst[-1].item() == 1
    st = sim.stats()
    assert st["h2d_pageable_n"] == 1
    assert st["h2d_pageable_bytes"] == 40 * MB
    assert st["h2d_pinned_n"] == 0


@timed
def test_blocking_copy_of_pinned_memory_blocks():
    src, dst, s = pin(10 * MB), torch.zeros(10 * MB, device=DEV), torch.simgpu.Stream()
    with torch.simgpu.stream(s):
        assert 0.035 < clock(lambda: dst.copy_(src)) < LATE
    assert s.query()
    assert dst[-1].item() == 1


@timed
def test_default_stream_copies_are_synchronous(sim):
    src = pin(10 * MB)
    t0 = time.perf_counter()
    dst = src.to(DEV, non_blocking=True)
    assert 0.035 < time.perf_counter() - t0 < LATE
    assert dst[-1].item() == 1
    assert races(sim) == 0


@timed
def test_every_copy_costs_the_latency(sim):
    sim.set_bandwidth(latency=2e-3)
    src, dst, s = pin(16), torch.zeros(16, device=DEV), torch.simgpu.Stream()

    def copy_twenty_times():
        with torch.simgpu.stream(s):
            for _ in range(20):
                dst.copy_(src, non_blocking=True)
        s.synchronize()

    assert 0.038 < clock(copy_twenty_times) < LATE


@pytest.fixture
def virtual_time(sim):
    """Times are computed, not waited for."""
    sim.set_virtual_time(True)


@pytest.mark.usefixtures("virtual_time")
def test_two_streams_share_the_copy_engine(sim):
    src, s = [pin(10 * MB), pin(10 * MB)], [torch.simgpu.Stream(), torch.simgpu.Stream()]
    dst = [torch.empty(10 * MB, device=DEV) for _ in s]
    t0 = sim.now()
    for i in range(2):
        with torch.simgpu.stream(s[i]):
            dst[i].copy_(src[i], non_blocking=True)
    torch.simgpu.synchronize()
    one = 40 * MB / 1e9
    assert sim.now() - t0 == pytest.approx(2 * one)
    assert sim.stats()["h2d_engine_busy_s"] == pytest.approx(2 * one)


@pytest.mark.usefixtures("virtual_time")
def test_copies_in_both_directions_overlap(sim):
    s, t, h, d = torch.simgpu.Stream(), torch.simgpu.Stream(), pin(10 * MB), torch.ones(10 * MB, device=DEV)
    back, dst = pin(10 * MB, 0), torch.empty(10 * MB, device=DEV)
    t0 = sim.now()
    with torch.simgpu.stream(s):
        dst.copy_(h, non_blocking=True)
    with torch.simgpu.stream(t):
        t.wait_event(torch.simgpu.default_stream().record_event())
        back.copy_(d, non_blocking=True)
    torch.simgpu.synchronize()
    assert back[-1].item() == 1
    assert sim.now() - t0 == pytest.approx(40 * MB / 1e9)
    assert sim.stats()["d2h_pinned_bytes"] == 40 * MB
    assert races(sim) == 0


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize("queued", [False, True])
def test_overlap_saves_time(sim, queued):
    sim.set_async_compute(queued)
    src, dst, s = pin(25 * MB), torch.empty(25 * MB, device=DEV), torch.simgpu.Stream()
    copy = 100 * MB / 1e9
    t0 = sim.now()
    with torch.simgpu.stream(s):
        dst.copy_(src, non_blocking=True)
        e = s.record_event()
    sim.busy(1.5 * copy)
    torch.simgpu.current_stream().wait_event(e)
    torch.simgpu.synchronize()
    assert sim.now() - t0 == pytest.approx(1.5 * copy)
    t0 = sim.now()
    dst.copy_(src, non_blocking=True)
    sim.busy(1.5 * copy)
    torch.simgpu.synchronize()
    assert sim.now() - t0 == pytest.approx(2.5 * copy)
    assert dst.sum().item() == 25 * MB
    assert races(sim) == 0


@timed
def test_overlap_saves_time_on_the_wall_as_well(sim):
    src, dst, s, T = pin(25 * MB), torch.empty(25 * MB, device=DEV), torch.simgpu.Stream(), 0.105
    t0 = time.perf_counter()
    with torch.simgpu.stream(s):
        dst.copy_(src, non_blocking=True)
        e = s.record_event()
    sim.busy(T)
    torch.simgpu.current_stream().wait_event(e)
    both = time.perf_counter() - t0
    t0 = time.perf_counter()
    dst.copy_(src, non_blocking=True)
    sim.busy(T)
    serial = time.perf_counter() - t0
    assert both < 0.8 * serial
    assert serial > 1.9 * T
    assert races(sim) == 0


@pytest.mark.usefixtures("virtual_time")
def test_virtual_time_passes_at_once_and_follows_what_waits_for_what(sim):
    a, b, e = torch.simgpu.Stream(), torch.simgpu.Stream(), torch.simgpu.Event(enable_timing=True)
    f = torch.simgpu.Event(enable_timing=True)
    begun, t0 = time.perf_counter(), sim.now()
    with torch.simgpu.stream(a):
        sim.busy(1000)
        e.record()
    with torch.simgpu.stream(b):
        sim.busy(1)
        b.wait_event(e)
        sim.busy(10)
        f.record()
    assert sim.now() == t0  # the host has waited for nothing
    e.synchronize()
    assert sim.now() - t0 == pytest.approx(1000)
    f.synchronize()
    assert sim.now() - t0 == pytest.approx(1010)
    assert e.elapsed_time(f) == pytest.approx(10e3)
    assert sim.stats()["host_wait_s"] == pytest.approx(1010)
    assert time.perf_counter() - begun < 100
    sim.set_virtual_time(False)
    assert sim.now() == pytest.approx(time.monotonic(), abs=LATE)


@pytest.mark.usefixtures("virtual_time")
def test_in_virtual_time_a_copy_begins_no_earlier_than_the_host_asked_for_it(sim):
    src, dst, s = pin(10 * MB), torch.empty(10 * MB, device=DEV), torch.simgpu.Stream()
    started, ready = (torch.simgpu.Event(enable_timing=True) for _ in range(2))
    before = torch.simgpu.Event(enable_timing=True)
    before.record()
    sim.busy(0.5)  # the default stream's work is done by the host itself here
    with torch.simgpu.stream(s):
        started.record()
        dst.copy_(src, non_blocking=True)
        ready.record()
    ready.synchronize()
    assert before.elapsed_time(started) == pytest.approx(500)
    assert started.elapsed_time(ready) == pytest.approx(40 * MB / 1e9 * 1e3)


def test_events_wait_between_side_streams(sim):
    a, b, dst, out = (
        torch.simgpu.Stream(),
        torch.simgpu.Stream(),
        torch.zeros(4, device=DEV),
        torch.zeros(4).pin_memory(),
    )
    src = pin(4, 7)
    torch.simgpu.synchronize()
    with torch.simgpu.stream(a):
        sim.busy(0.05)
        dst.copy_(src, non_blocking=True)
        e = a.record_event()
    b.wait_event(e)
    with torch.simgpu.stream(b):
        out.copy_(dst, non_blocking=True)
    assert out[0] == 0
    b.synchronize()
    assert out[0] == 7
    assert races(sim) == 0
    b.wait_stream(a)
    assert torch.simgpu.Event().query()  # never recorded
    with pytest.raises(ValueError, match="must be recorded"):
        torch.simgpu.Event().elapsed_time(torch.simgpu.Event())


def test_events_measure_the_time_between_them(sim):
    start, end = torch.simgpu.Event(enable_timing=True), torch.simgpu.Event(enable_timing=True)
    start.record()
    sim.busy(0.05)
    end.record()
    end.synchronize()
    assert 45 < start.elapsed_time(end) < LATE * 1e3


@timed
def test_event_records_again(sim):
    s, e = torch.simgpu.Stream(), torch.simgpu.Event()
    with torch.simgpu.stream(s):
        e.record()
        e.synchronize()
        sim.busy(0.05)
        e.record()
    assert not e.query()
    assert 0.03 < clock(e.synchronize) < LATE


def test_host_waits_are_counted_and_release_the_gil(sim):
    s, n = torch.simgpu.Stream(), [0]
    stop = threading.Event()

    def count():
        while not stop.is_set():
            n[0] += 1
            time.sleep(0.001)

    th = threading.Thread(target=count)
    th.start()
    with torch.simgpu.stream(s):
        sim.busy(0.1)
        e = s.record_event()
    k = n[0]
    torch.simgpu.current_stream().wait_event(e)
    k = n[0] - k
    stop.set()
    th.join()
    assert k > 20
    assert 0.08 < sim.stats()["host_wait_s"] < LATE


@timed
def test_compute_time_can_be_set(sim):
    x = torch.ones(4, device=DEV)
    sim.set_compute(op_seconds=0.02)
    assert 0.055 < clock(lambda: x.add(1).mul(2).sub(1)) < LATE
    sim.set_compute()
    assert 0.045 < clock(lambda: sim.busy(0.05)) < LATE


@timed
def test_compute_on_a_side_stream_is_queued_behind_its_copy(sim):
    src, s = pin(10 * MB, 3), torch.simgpu.Stream()
    with torch.simgpu.stream(s):
        w = src.to(
            DEV, non_blocking=True
        )  # once before: the meta kernels get imported, the memory gets cached
        (w * 2).to(torch.float16)
        del w
        s.synchronize()
        t0 = time.perf_counter()
        w = src.to(DEV, non_blocking=True)
        y = (w * 2).to(torch.float16)
        e = s.record_event()
        t = time.perf_counter() - t0
    assert t < 0.03
    assert not e.query()
    assert sim.stats()["ops_deferred"] >= 2
    torch.simgpu.current_stream().wait_event(e)
    assert y[-1].item() == 6
    assert races(sim) == 0


def test_copy_converts_the_dtype_where_cuda_does(sim):
    src, s = pin(MB, 1.5), torch.simgpu.Stream()
    with torch.simgpu.stream(s):
        a = src.to(DEV, torch.float16, non_blocking=True)  # CUDA: copies float32, converts on the device
        b = src.to(DEV, torch.float16)  # CUDA: converts on the CPU, a pageable copy
    torch.simgpu.synchronize()
    st = sim.stats()
    assert a.dtype == b.dtype == torch.float16
    assert a.float().sum().item() == b.float().sum().item() == 1.5 * MB
    assert st["h2d_pinned_bytes"] == 4 * MB
    assert st["h2d_pageable_bytes"] == 2 * MB


# ---- hazards show
def test_missing_wait_gives_wrong_data_and_is_counted(sim):
    src, dst, s = pin(10 * MB, 5), torch.zeros(10 * MB, device=DEV), torch.simgpu.Stream()
    sim.set_bandwidth(h2d=0.2e9)  # slow enough for a busy machine
    torch.simgpu.synchronize()
    with torch.simgpu.stream(s):
        dst.copy_(src, non_blocking=True)
        e = s.record_event()
    wrong = (dst * 1)[-1].item()  # reads before the copy: no wait_event
    torch.simgpu.current_stream().wait_event(e)
    right = (dst * 1)[-1].item()
    assert wrong == 0
    assert right == 5
    assert sim.hazards()["race_read_after_write"] == 1
    assert "h2d_pinned copy" in sim.hazard_log()[-1]


def ring(sim, events, layers=8, slots=2, ahead=2, n=MB, compute=0.002):
    """Weights of all layers through a ring of slots: (what the layers saw, what they should have seen).

    events: whether a slot is refilled only after an event that follows the compute on its last layer.
    """
    w = [pin(n, float(i + 1)) for i in range(layers)]
    arena = torch.zeros(slots, n, device=DEV)
    s, main, seen = torch.simgpu.Stream(), torch.simgpu.current_stream(), []
    ready, done = {}, {}
    s.wait_stream(main)

    def load(i):
        if events and i - slots in done:
            s.wait_event(done[i - slots])
        with torch.simgpu.stream(s):
            arena[i % slots].copy_(w[i], non_blocking=True)
            ready[i] = s.record_event()

    for i in range(min(ahead, layers)):
        load(i)
    for i in range(layers):
        main.wait_event(ready[i])
        sim.busy(compute)
        y = arena[i % slots] * 1
        done[i] = main.record_event()
        seen.append(y)
        if i + ahead < layers:
            load(i + ahead)
    torch.simgpu.synchronize()
    return [t[-1].item() for t in seen], [float(i + 1) for i in range(layers)]


def test_ring_with_events_is_right(sim):
    got, want = ring(sim, True)
    assert got == want
    assert races(sim) == 0


def test_ring_prefetching_too_far_corrupts(sim):
    got, want = ring(
        sim, "stream", slots=2, ahead=3, compute=0.02
    )  # the third load goes to a slot that is not computed yet
    assert got != want
    assert races(sim) > 0


def test_ring_reuse_without_event_is_counted_with_synchronous_compute(sim):
    got, want = ring(sim, False)  # the host runs compute itself, so the data happen to be right here ...
    assert got == want
    assert sim.hazards()["race_write_after_read"] == 6


def test_ring_reuse_without_event_corrupts_with_asynchronous_compute(sim):
    sim.set_async_compute(True)
    got, want = ring(sim, True)
    assert got == want
    assert races(sim) == 0
    sim.set_bandwidth(h2d=0)
    got, want = ring(sim, False)
    assert got != want
    assert sim.hazards()["race_write_after_read"] >= 6


def test_staging_buffer_reused_too_early_corrupts(sim):
    stage, dst, s = pin(MB, 1), torch.zeros(2, MB, device=DEV), torch.simgpu.Stream()
    torch.simgpu.synchronize()
    with torch.simgpu.stream(s):
        sim.busy(0.02)
        dst[0].copy_(stage, non_blocking=True)
        stage.fill_(2)  # no wait for the first copy
        dst[1].copy_(stage, non_blocking=True)
    torch.simgpu.synchronize()
    assert dst[0][0].item() == 2
    assert sim.hazards()["staging_overwritten"] == 1


def test_staging_buffer_with_events_is_right(sim):
    stage, dst, s = pin(MB, 1), torch.zeros(2, MB, device=DEV), torch.simgpu.Stream()
    with torch.simgpu.stream(s):
        dst[0].copy_(stage, non_blocking=True)
        s.record_event().synchronize()
        stage.fill_(2)
        dst[1].copy_(stage, non_blocking=True)
    torch.simgpu.synchronize()
    assert dst[0][0].item() == 1
    assert dst[1][0].item() == 2
    assert sim.hazards()["staging_overwritten"] == 0


def test_fresh_and_freed_memory_holds_the_poison_byte(sim):
    x = torch.empty(1000, dtype=torch.uint8, device=DEV)
    assert (x.cpu() == 0xC5).all()
    x.fill_(1)
    del x
    y = torch.empty(1000, dtype=torch.uint8, device=DEV)  # the same memory again
    assert (y.cpu() == 0xC5).all()
    sim.set_poison(0x11)
    assert (torch.empty(5000, dtype=torch.uint8, device=DEV).cpu() == 0x11).all()


def test_pinned_source_freed_in_flight_is_kept_alive_and_counted(sim):
    dst, s = torch.zeros(10 * MB, device=DEV), torch.simgpu.Stream()
    src = pin(10 * MB, 9)
    with torch.simgpu.stream(s):
        dst.copy_(src, non_blocking=True)
    del src
    torch.simgpu.synchronize()
    assert dst[-1].item() == 9
    assert sim.hazards()["pinned_freed_in_flight"] == 1
    assert sim.stats()["pinned_bytes"] == 0


def test_use_after_free_corrupts_and_is_counted(sim):
    src, s = pin(10 * MB, 9), torch.simgpu.Stream()
    dst = torch.empty(10 * MB, device=DEV)  # allocated on the default stream
    sim.set_bandwidth(h2d=0.2e9)  # slow enough for a busy machine
    with torch.simgpu.stream(s):
        dst.copy_(src, non_blocking=True)
    del dst  # freed with the copy under way
    victim = torch.zeros(10 * MB, device=DEV)  # gets the same memory, as from CUDA's caching allocator
    assert victim[-1].item() == 0
    torch.simgpu.synchronize()
    assert victim[-1].item() == 9
    assert sim.hazards()["use_after_free"] == 1


def test_record_stream_prevents_use_after_free(sim):
    src, s = pin(10 * MB, 9), torch.simgpu.Stream()
    dst = torch.empty(10 * MB, device=DEV)
    with torch.simgpu.stream(s):
        dst.copy_(src, non_blocking=True)
    dst.record_stream(s)
    base = sim.stats()["device_bytes"]
    del dst
    assert sim.stats()["device_bytes"] == base  # still held
    victim = torch.zeros(10 * MB, device=DEV)
    torch.simgpu.synchronize()
    assert victim[-1].item() == 0
    assert sim.hazards()["use_after_free"] == 0
    assert races(sim) == 0
    torch.simgpu.mem_get_info()
    assert sim.stats()["device_bytes"] == base  # dst is gone, victim is there


@timed
def test_oom_waits_for_memory_held_by_record_stream(sim):
    sim.set_total(torch.simgpu.memory_allocated() + 60 * MB)
    src, s = pin(10 * MB), torch.simgpu.Stream()
    dst = torch.empty(10 * MB, device=DEV)
    with torch.simgpu.stream(s):
        dst.copy_(src, non_blocking=True)
    dst.record_stream(s)
    del dst
    assert 0.02 < clock(lambda: torch.empty(10 * MB, device=DEV)) < LATE


def test_free_that_nothing_orders_is_counted(sim):
    src, s = pin(MB), torch.simgpu.Stream()
    for case in range(3):
        sim.reset()
        with torch.simgpu.stream(s):
            w = src.to(DEV, non_blocking=True)  # memory of the side stream
            e = s.record_event()
        torch.simgpu.current_stream().wait_event(e)
        (w * 2).sum()  # read by the default stream
        if case == 1:
            w.record_stream(torch.simgpu.current_stream())
        if case == 2:
            s.wait_stream(torch.simgpu.current_stream())
        del w
        assert sim.hazards()["free_unordered"] == (case == 0), case


# ---- counters, limits, failures
def test_copies_are_counted_per_kind_and_stream(sim):
    s = torch.simgpu.Stream()
    a, p, q = pin(1000), torch.ones(2000), torch.empty(1000).pin_memory()
    with torch.simgpu.stream(s):
        x = a.to(DEV, non_blocking=True)
    s.synchronize()
    y = p.to(DEV)
    q.copy_(x)
    y.cpu()
    y.clone()
    st = sim.stats()
    assert [
        st[k + "_bytes"] for k in ("h2d_pinned", "h2d_pageable", "d2h_pinned", "d2h_pageable", "d2d")
    ] == [4000, 8000, 4000, 8000, 8000]
    assert st["streams"][s.stream_id]["h2d_pinned_n"] == 1
    assert st["streams"][0]["h2d_pinned_n"] == 0
    assert st["streams"][0]["d2h_pageable_n"] == 1
    assert st["peak_device_bytes"] >= 12000
    assert st["peak_pinned_bytes"] == 8000


def test_pinned_memory_is_limited(sim):
    sim.set_pin_limit(10 * MB)
    a = torch.empty(8 * MB, dtype=torch.uint8).pin_memory()
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(4 * MB, dtype=torch.uint8).pin_memory()
    with pytest.raises(RuntimeError):
        torch.empty(4 * MB, dtype=torch.uint8, pin_memory=True)
    del a
    torch.empty(4 * MB, dtype=torch.uint8).pin_memory()
    with sim.settings(pin_pow2=True):
        held = torch.empty(5 * MB, dtype=torch.uint8).pin_memory()
        assert held.is_pinned()
        assert sim.stats()["pinned_bytes"] == 8 * MB


def test_failures_happen_when_asked_for(sim):
    sim.fail_next_pinned(2)
    a = pin(10)
    with pytest.raises(RuntimeError):
        pin(10)
    pin(10)
    sim.fail_next_device(2)
    torch.empty(10, device=DEV)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(10, device=DEV)
    sim.fail_next_copy(2)
    a.to(DEV)
    with pytest.raises(RuntimeError):
        a.to(DEV)
    a.to(DEV)


def test_settings_come_from_the_environment():
    program = "import simgpu; c = simgpu.config(); print(c['total'], c['h2d'], c['pageable'], c['latency'])"
    environment = {
        "PYTHONPATH": str(Path(__file__).resolve().parent),
        "SIMGPU_TOTAL_MB": "100",
        "SIMGPU_H2D_GBPS": "3",
        "SIMGPU_PAGEABLE_GBPS": "1.5",
        "SIMGPU_LATENCY_US": "7",
    }
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [float(x) for x in run.stdout.split()] == [100 * MB, 3e9, 1.5e9, 7e-6]


def test_cached_blocks_can_count_against_free_memory(sim):
    free = torch.simgpu.mem_get_info()[0]
    with sim.settings(cache_counts=True):
        x = torch.empty(50 * MB, dtype=torch.uint8, device=DEV)
        del x
        assert torch.simgpu.mem_get_info()[0] == free - 50 * MB
        torch.simgpu.empty_cache()
        assert torch.simgpu.mem_get_info()[0] == free


# ---- host_register
def test_registered_memory_is_pinned_until_it_is_unregistered(sim):
    x = torch.ones(MB)
    assert not x.is_pinned()
    sim.host_register(x.data_ptr(), x.nbytes)
    assert x.is_pinned()
    assert x[1000:].is_pinned()
    assert sim.stats()["registered_bytes"] == x.nbytes
    with pytest.raises(RuntimeError, match="already mapped"):
        sim.host_register(x.data_ptr() + 8, 16)
    s = torch.simgpu.Stream()
    with torch.simgpu.stream(s):
        y = x.to(DEV, non_blocking=True)
    s.synchronize()
    assert y.sum().item() == MB
    assert sim.stats()["h2d_pinned_n"] == 1
    sim.host_unregister(x.data_ptr())
    assert not x.is_pinned()
    with pytest.raises(RuntimeError):
        sim.host_unregister(x.data_ptr())
    sim.set_pin_limit(10)
    with pytest.raises(RuntimeError):
        sim.host_register(x.data_ptr(), x.nbytes)
    rt = torch.simgpu.cudart()
    assert rt.cudaHostRegister(x.data_ptr(), x.nbytes, 0) == 2
    assert rt.cudaHostUnregister(x.data_ptr()) == 713
    sim.set_pin_limit()
    assert rt.cudaHostRegister(x.data_ptr(), x.nbytes, 0) == 0
    assert rt.cudaHostRegister(x.data_ptr(), x.nbytes, 0) == 712
    assert rt.cudaHostUnregister(x.data_ptr()) == 0
    with pytest.raises(RuntimeError, match="out of memory"):
        sim.synchronize()  # the first of these errors is left behind, as CUDA's
    sim.synchronize()


def test_registered_memory_is_pinned_in_a_process_that_did_nothing_else_before():
    program = (
        "import simgpu, torch; x = torch.ones(1000); simgpu.host_register(x.data_ptr(), x.nbytes); "
        "print(x.is_pinned(), torch.ones(1000).is_pinned())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["True", "False"]


def test_partly_registered_memory_is_pageable(sim):
    x = torch.ones(MB)
    sim.host_register(x.data_ptr(), x.nbytes // 2)
    x.to(DEV)
    sim.host_unregister(x.data_ptr())
    assert sim.stats()["h2d_pageable_n"] == 1


def test_registered_memory_released_in_flight_is_counted(sim):
    x, dst, s = torch.full((10 * MB,), 4.0), torch.zeros(10 * MB, device=DEV), torch.simgpu.Stream()
    p = x.data_ptr()
    sim.host_register(p, x.nbytes)
    with torch.simgpu.stream(s):
        dst.copy_(x, non_blocking=True)
    del x
    sim.host_unregister(p)
    torch.simgpu.synchronize()
    assert dst[-1].item() == 4
    assert sim.hazards()["registered_freed_in_flight"] >= 1


# ---- compute is right
@pytest.mark.parametrize("mode", ["sync", "async", "side"])
def test_modules_equal_the_cpu(sim, mode):
    torch.manual_seed(0)
    sim.set_async_compute(mode == "async")
    ctx = torch.simgpu.stream(torch.simgpu.Stream()) if mode == "side" else torch.simgpu.stream(None)
    lin, ln, gn, cv = (
        torch.nn.Linear(64, 64),
        torch.nn.LayerNorm(64),
        torch.nn.GroupNorm(4, 8),
        torch.nn.Conv2d(8, 8, 3, padding=1),
    )
    x, img = torch.randn(2, 10, 64), torch.randn(2, 8, 6, 6)

    def net(x, img, m):
        h = m[1](m[0](x))
        q = h.view(2, 10, 4, 16).transpose(1, 2)
        a = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(2, 10, 64)
        h = (
            h
            + F.silu(a) * torch.sigmoid(h.mean(-1, keepdim=True))
            - torch.cat([a, a], -1)[..., :64].softmax(-1)
        )
        h[:, 3] = 0
        h.mul_(2).clamp_(-3, 3)
        return (
            h,
            F.gelu(m[2](m[3](img))),
            torch.einsum("bij,bkj->bik", h, h),
            h[h > 0].sum(),
            h.argmax(-1),
            torch.arange(5, device=x.device).float().pow(2),
        )

    ms = [lin, ln, gn, cv]
    with torch.no_grad():
        want = net(x, img, ms)
        with ctx:
            got = net(x.to(DEV), img.to(DEV), [copy.deepcopy(m).to(DEV) for m in ms])
            for g, w in zip(got, want, strict=False):
                assert g.device.type == "simgpu"
                torch.testing.assert_close(g.cpu(), w)
            torch.simgpu.current_stream().synchronize()


@pytest.mark.parametrize("side_stream", [False, True])
def test_elementwise_operators_on_several_dtypes_equal_the_cpu(sim, side_stream):
    rows, columns = 5000, 32
    numbers = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    scale, offset = torch.randn(rows, 1), torch.randn(columns)
    half = torch.randn(rows, columns).half()

    def results(numbers, scale, offset, half):
        planes = numbers.new_empty((rows, 2, columns), dtype=torch.bfloat16)
        torch.addcmul(offset, numbers, scale, value=2, out=planes[:, 0])
        torch.mul(numbers, scale, out=planes[:, 1])
        return (
            planes,
            numbers * scale,
            half - offset,
            torch.sub(half, scale, alpha=3),
            torch.addcmul(half, numbers, scale),
            half.clone().mul_(scale),
            half.clone().addcmul_(numbers, scale),
            numbers * torch.tensor(0.5),
            half.t() + numbers.t(),
        )

    inputs = (numbers, scale, offset, half)
    wanted = results(*inputs)
    with torch.simgpu.stream(torch.simgpu.Stream() if side_stream else None):
        got = results(*(tensor.to(DEV) for tensor in inputs))
        torch.simgpu.current_stream().synchronize()
    for ours, cpu in zip(got, wanted, strict=True):
        assert ours.dtype == cpu.dtype
        assert ours.stride() == cpu.stride()
        assert torch.equal(ours.cpu(), cpu)


def test_results_of_elementwise_operators_on_several_dtypes_are_resized(sim):
    numbers = torch.ones(5000, 32, dtype=torch.int8, device=DEV)
    scale = torch.rand(5000, 1, device=DEV)
    for size in (0, 3):
        out = torch.empty(size, device=DEV)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch advises against it
            torch.mul(numbers, scale, out=out)
        assert torch.equal(out, numbers * scale)


def test_views_dtypes_and_random_numbers_work_in_inference_mode():
    with torch.inference_mode():
        u = torch.randint(0, 255, (4, 18), dtype=torch.uint8)
        d = u.to(DEV)
        assert torch.equal(
            d[:, :2].contiguous().view(torch.float16).view(torch.int16).cpu(),
            u[:, :2].contiguous().view(torch.float16).view(torch.int16),
        )
        assert torch.equal((d[:, 2:] & 15).to(torch.int8).cpu(), (u[:, 2:] & 15).to(torch.int8))
        z = torch.view_as_real(torch.view_as_complex(torch.randn(3, 2).to(DEV)))
        assert z.shape == (3, 2)
    gen = torch.Generator(device="simgpu").manual_seed(3)
    a = torch.randn(4, device=DEV, generator=gen)
    b = torch.randn(4, device=DEV, generator=torch.Generator(device="simgpu").manual_seed(3))
    assert torch.equal(a.cpu(), b.cpu())
    torch.manual_seed(1)
    c = torch.randn(3)
    torch.manual_seed(1)
    torch.randn(3, device=DEV)  # the device's generator is its own
    assert torch.equal(c, torch.randn(3))
    x = torch.zeros(0, device=DEV)
    assert x.numel() == 0
    assert torch.cat([x, torch.ones(2, device=DEV)]).sum().item() == 2
    st = torch.ones(100, device=DEV).untyped_storage()
    st.resize_(0)
    assert st.nbytes() == 0


def test_mixed_devices_raise():
    with pytest.raises(RuntimeError, match="same device"):
        F.linear(torch.ones(2, 4, device=DEV), torch.ones(3, 4))
    assert (torch.ones(2, device=DEV) * torch.tensor(3.0)).sum().item() == 6


def test_error_in_queued_work_is_raised_at_the_next_sync():
    s = torch.simgpu.Stream()
    with torch.simgpu.stream(s):
        torch.zeros(3, device=DEV)[torch.tensor([7], device=DEV)].add(
            1
        )  # the index is out of range, only the kernel can tell
    with pytest.raises((RuntimeError, IndexError)):
        s.synchronize()
    s.synchronize()


def test_many_threads_with_a_stream_each_get_their_own_data(sim):
    def work(i):
        s = torch.simgpu.Stream()
        with torch.simgpu.stream(s):
            for k in range(20):
                src = pin(1000 + i, float(k))
                d = src.to(DEV, non_blocking=True)
                e = s.record_event()
                e.synchronize()
                ok.append((d + 1)[-1].item() == k + 1)

    ok = []
    ts = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in ts:
        t.start()
    for t in ts:
        t.join()
    assert len(ok) == 160
    assert all(ok)
    assert races(sim) == 0

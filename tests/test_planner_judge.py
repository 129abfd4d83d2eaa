"""The judge of the planner: its simulator against arithmetic, the step model, the search's own model and the
engine itself on the simulated accelerator; and the planner in its eyes."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from swap_models import clean_engine

from lib_qswap.swap.manager import attached
from lib_qswap.swap.planner import LayerCost, predict_step

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import planner_judge  # noqa: E402
from engine_simulator import STAGING_BUFFER_BYTES, Machine, simulate  # noqa: E402

MB = 10**6
ENGINE_TOLERANCE = 0.005
"""How far the engine on the simulated accelerator may be from what is predicted for it."""
GPU_TOLERANCE = 0.05


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        if os.environ.get("CI"):
            pytest.fail("no C++ compiler")
        pytest.skip("no C++ compiler for the long search")
    return planner_judge.compile_search(tmp_path_factory.mktemp("search"))


def mean_step(layers, resident, ring_bytes, machine, steps=20, warm_up=4):
    """Seconds of a step in the simulator, once the ring has filled."""
    done = simulate(layers, resident, ring_bytes=ring_bytes, machine=machine, steps=steps)
    return statistics.fmean(step.seconds for step in done[warm_up:])


def random_model(seed):
    """Layers, residents, a ring and a link that leave compute and copies waiting for each other."""
    rng = random.Random(seed)
    layers = [
        LayerCost(str(i), rng.randrange(1, 20) * MB, rng.choice((0, 0.5, 1, 2)) / 1e3)
        for i in range(rng.randrange(4, 30))
    ]
    resident = [layer.name for layer in layers if rng.random() < 0.4]
    largest = max((x.nbytes for x in layers if x.name not in resident), default=1)
    return layers, resident, round(largest * rng.uniform(1, 4)), rng.choice((5e9, 1e10, 2e10))


# ---- the simulator


def test_a_copy_s_latency_is_paid_once_a_layer():
    # 4 copies of 1 ms, and 0.5 ms before each, one after the other: compute (4 x 0.1 ms) hides behind them
    layers = [LayerCost(str(i), 10 * MB, 1e-4) for i in range(4)]
    step_s = mean_step(layers, [], 20 * MB, Machine(1e10, copy_latency_s=5e-4))
    assert step_s == pytest.approx(4 * 1.5e-3)


def test_host_time_is_hidden_until_it_is_longer_than_compute():
    layers = [LayerCost(str(i), 10 * MB, 1e-3) for i in range(4)]
    names = [layer.name for layer in layers]
    assert mean_step(layers, names, 0, Machine(1e10, host_issue_s=9e-4)) == pytest.approx(4e-3)
    assert mean_step(layers, names, 0, Machine(1e10, host_issue_s=2e-3)) == pytest.approx(8e-3)


@pytest.mark.parametrize(("read", "link"), [(2e9, 1e10), (1e10, 2e9)])
def test_cpu_and_disk_are_as_fast_as_the_slower_of_reading_and_the_link(read, link):
    layers = [LayerCost(str(i), 5 * STAGING_BUFFER_BYTES, 0.0) for i in range(8)]
    step_s = mean_step(layers, [], 10 * STAGING_BUFFER_BYTES, Machine(link, read_bytes_per_s=read))
    assert step_s == pytest.approx(8 * 5 * STAGING_BUFFER_BYTES / 2e9)


def test_stalls_are_what_a_step_takes_over_its_compute():
    layers = [LayerCost(str(i), 10 * MB, 1e-3) for i in range(4)]
    steps = simulate(layers, [], ring_bytes=20 * MB, machine=Machine(2e9), steps=6)
    for step in steps[1:]:
        assert step.stall_s == pytest.approx(step.seconds - 4e-3)
        assert step.seconds == pytest.approx(40 * MB / 2e9)


def test_a_layer_larger_than_the_ring_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        simulate([LayerCost("a", 2, 1.0)], [], ring_bytes=1, machine=Machine(1.0), steps=1)


@pytest.mark.parametrize("seed", range(30))
def test_simulator_step_model_and_search_agree(seed, library):
    layers, resident, ring_bytes, link = random_model(seed)
    # Where the ring wraps differs from step to step: the mean of many.
    simulated_s = mean_step(layers, resident, ring_bytes, Machine(link), steps=260, warm_up=60)
    modelled_s = predict_step(layers, resident, ring_bytes=ring_bytes, link_bytes_per_s=link)
    swapped = [layer.name not in resident for layer in layers]
    search = planner_judge.LongSearch(library, planner_judge.Case("", layers, link, 1.0))
    assert search.step_s(swapped, ring_bytes, 200) == pytest.approx(simulated_s, rel=0.005)
    assert search.step_s(swapped, ring_bytes, 6) == pytest.approx(modelled_s, rel=1e-9)
    assert modelled_s == pytest.approx(simulated_s, rel=0.03)


# ---- the engine


class Busy(torch.nn.Module):
    """Linears of several sizes that, instead of computing, keep the device busy for a set time each."""

    def __init__(self, widths_and_work, busy):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(512, width, bias=False, dtype=torch.float16).requires_grad_(False)
            for width, _ in widths_and_work
        )
        for layer, (_, work) in zip(self.layers, widths_and_work, strict=True):
            layer.forward = lambda x, work=work: (busy(work), x)[1] if work else x

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def measured_step(model, attachment, device, steps=24, warm_up=8):
    """Seconds of the engine's steps after those that trace and measure, by events on the compute stream;
    the host does not wait between steps, which would let copies run ahead."""
    timeline, stream = attachment.state.streamer.timeline, attachment.device.current_stream()
    with torch.inference_mode():
        x = torch.ones(1, dtype=torch.float16, device=device)
        for step in range(steps):
            if step == warm_up:
                begun = timeline.mark(stream)
            model(x)
            if step < warm_up // 2:
                attachment.device.synchronize()  # The plan from measured times is made before it counts.
    ended = timeline.mark(stream)
    attachment.device.synchronize()
    return begun.elapsed_time(ended) * 1e-3 / (steps - warm_up)


def residency(attachment, times):
    """(layers, names of the residents, ring) as they are on the device."""
    layers = [LayerCost(layer.name, layer.payload_bytes, *times(layer)) for layer in attachment.layers]
    resident = [layer.name for layer in attachment.layers if layer.resident is not None]
    return layers, resident, attachment.state.streamer.ring_bytes


@pytest.mark.simgpu
@pytest.mark.usefixtures("virtual_time", "engine")
@pytest.mark.parametrize("location", ["shared", "cpu"])
@pytest.mark.parametrize("latency_s", [0.0, 0.0004])
@pytest.mark.parametrize(("link", "share"), [(100e6, 0.3), (250e6, 0.3), (600e6, 0.2), (250e6, 0.7)])
def test_the_engine_s_steps_are_as_long_as_the_simulator_predicts(
    sim, compute_mode, link, share, latency_s, location
):
    rng = random.Random(1)
    sizes = [(rng.choice((256, 512, 1024, 2048)), rng.choice((0, 0.002, 0.005))) for _ in range(40)]
    sim.set_bandwidth(h2d=link, latency=latency_s)
    total = sum(width * 512 * 2 for width, _ in sizes)
    options = {"device": "simgpu", "location": location, "budget_bytes": round(total * share)}
    model = Busy(sizes, sim.busy)
    with attached(model, **options) as attachment:
        engine_s = measured_step(model, attachment, "simgpu")
        layers, resident, ring_bytes = residency(
            attachment, lambda layer: (sizes[int(layer.name.rpartition(".")[2])][1],)
        )
        assert 0 < len(resident) < len(layers)
    # Reading takes no virtual time.
    read = None if location == "shared" else math.inf
    machine = Machine(link, copy_latency_s=latency_s, read_bytes_per_s=read)
    simulated_s = mean_step(layers, resident, ring_bytes, machine)
    assert engine_s == pytest.approx(simulated_s, rel=ENGINE_TOLERANCE)
    if not latency_s:
        modelled_s = predict_step(layers, resident, ring_bytes=ring_bytes, link_bytes_per_s=link)
        assert engine_s == pytest.approx(modelled_s, rel=ENGINE_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU here")
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_on_a_gpu_steps_are_as_long_as_the_simulator_predicts_from_measured_times(share):
    rng = random.Random(1)
    # Some 10 to 100 MB, and milliseconds, each.
    cycles = (0, 4_000_000, 10_000_000)
    sizes = [(rng.choice((1, 2, 4, 8)) * 12_288, rng.choice(cycles)) for _ in range(40)]
    total = sum(width * 512 * 2 for width, _ in sizes)
    model = Busy(sizes, torch.cuda._sleep)
    with (
        clean_engine(),
        attached(model, device="cuda", location="shared", budget_bytes=round(total * share)) as attachment,
    ):
        engine_s = measured_step(model, attachment, "cuda")
        layers, resident, ring_bytes = residency(attachment, lambda layer: layer.times.measured)
        link = attachment.link_bytes_per_s()
    simulated_s = mean_step(layers, resident, ring_bytes, Machine(link))
    assert engine_s == pytest.approx(simulated_s, rel=GPU_TOLERANCE)


# ---- the planner


def test_the_search_improves_what_it_starts_from_within_the_budget(library):
    layers = planner_judge.models.sdxl_unet(planner_judge.models.Q8_0, 100)
    case = planner_judge.Case("SDXL", layers, 12e9, 0.5)
    search = planner_judge.LongSearch(library, case)
    starts = search.constructions(50, 3)
    assert len(starts) == 3
    for start in starts:
        improved = search.improve(start, 2000, 0.003, seed=0)
        pairs = list(zip(case.layers, improved.swapped, strict=True))
        kept = sum(layer.nbytes for layer, fetched in pairs if not fetched)
        assert kept + improved.ring_bytes <= case.budget_bytes
        assert improved.step_s <= start.step_s
        again = search.step_s(list(improved.swapped), improved.ring_bytes, planner_judge.SEARCH_STEPS)
        assert again == pytest.approx(improved.step_s)
    assert min(search.improve(start, 2000, 0.003, seed=0).step_s for start in starts) < starts[0].step_s


def test_plans_are_within_half_a_percent_of_a_long_search_and_within_their_budget(library, tmp_path):
    path = tmp_path / "planner.json"
    command = [sys.executable, str(BENCHMARKS / "planner_judge.py"), "--short", "--json", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=1800)
    result = json.loads(path.read_text())
    assert result["summary"]["over_budget"] == 0
    assert 5 < result["summary"]["at_the_bound"] < result["summary"]["cases"] - 5
    for row in result["rows"]:
        assert row["plan_over_best"] <= 1.005, row
        assert row["plan_s"] >= row["bound_s"] * (1 - 1e-9), row
        assert row["step_model_s"] == pytest.approx(row["plan_s"], rel=0.001), row

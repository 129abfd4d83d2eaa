"""Times are measured for each shape of the work, and a plan follows them where it pays."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import swap_models as sm
import torch
from swap_models import messages

from lib_qswap.swap.adaptation import LOOK_AT_LINK_STEPS
from lib_qswap.swap.device import Device, device_of
from lib_qswap.swap.layer import LayerTimes, Measured
from lib_qswap.swap.manager import attached
from lib_qswap.swap.planner import Plan
from lib_qswap.swap.profile import ASSUMED_UNPACKING, KEPT_WORKS, Profile, costs, gain, work_of

GPU = "simgpu:0"
COUNT = 16
LAYER_BYTES = 1024 * 1024 * 2
LONG_S, SHORT_S = 0.02, 0.0005


class Halves(torch.nn.Module):
    """Layers of which the first half is slow for one row of input, and the second half for two rows."""

    def __init__(self, sim):
        super().__init__()
        self.more_s = 0.0
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(1024, 1024, bias=False, dtype=torch.float16).requires_grad_(False)
            for _ in range(COUNT)
        )
        for i, layer in enumerate(self.layers):
            layer.forward = lambda x, i=i: (
                sim.busy(self.more_s + (LONG_S if (x.shape[0] == 1) == (i < COUNT // 2) else SHORT_S)),
                x,
            )[1]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def resident(attachment):
    return [int(layer.name.split(".")[1]) for layer in attachment.layers if layer.resident is not None]


def steps(model, rows, count):
    x = torch.ones(rows, dtype=torch.float16, device=GPU)
    for _ in range(count):
        model(x)
        torch.simgpu.synchronize()


@pytest.fixture
def halves(sim, engine, compute_mode, virtual_time):
    """Half of the layers fit beside the ring, and a copy takes as long as a slow layer."""
    sim.set_bandwidth(h2d=LAYER_BYTES / LONG_S)
    model = Halves(sim)
    options = {"budget_bytes": (COUNT // 2 + 2) * LAYER_BYTES, "ring_bytes": 2 * LAYER_BYTES}
    with attached(model, device=GPU, location="shared", **options) as attachment, torch.inference_mode():
        yield model, attachment


def last_step_s(attachment):
    attachment.state.streamer.timeline.collect()
    return attachment.state.streamer.timeline.finished[-1].seconds


@pytest.mark.simgpu
def test_layers_that_take_long_are_those_that_are_swapped_whatever_the_work(halves):
    model, attachment = halves
    steps(model, 1, 6)
    assert attachment.layers[0].times.measured.compute_s == pytest.approx(LONG_S, rel=0.01)
    fast = sum(i >= COUNT // 2 for i in resident(attachment))
    assert fast > COUNT // 4  # of those that leave no time for a copy

    steps(model, 2, 2)
    unplanned_s = last_step_s(attachment)
    steps(model, 2, 4)
    assert attachment.layers[0].times.measured.compute_s == pytest.approx(SHORT_S, rel=0.01)
    assert sum(i < COUNT // 2 for i in resident(attachment)) > COUNT // 4
    assert last_step_s(attachment) < unplanned_s


@pytest.mark.simgpu
@pytest.mark.parametrize("disturbed", [0, 1])
def test_a_measured_step_that_was_disturbed_does_not_make_the_plan(sim, halves, disturbed):
    model, attachment = halves
    for step in range(4):
        model.more_s = LONG_S if step == disturbed else 0.0
        steps(model, 1, 1)
    times = [layer.times.measured.compute_s for layer in attachment.layers]
    assert times == pytest.approx([LONG_S] * (COUNT // 2) + [SHORT_S] * (COUNT // 2), rel=0.01)


@pytest.mark.simgpu
def test_the_plan_follows_a_link_that_has_become_faster(sim, halves):
    """At first it is the limit, whatever is resident."""
    model, attachment = halves
    sim.set_bandwidth(h2d=LAYER_BYTES / LONG_S / 8)
    steps(model, 1, 6)
    sim.set_bandwidth(h2d=LAYER_BYTES / LONG_S)
    steps(model, 1, 3)
    before_s, before = last_step_s(attachment), resident(attachment)
    steps(model, 1, 3 * LOOK_AT_LINK_STEPS)
    assert resident(attachment) != before
    assert sum(i >= COUNT // 2 for i in resident(attachment)) > COUNT // 4
    assert last_step_s(attachment) < 0.9 * before_s


@pytest.mark.simgpu
def test_a_link_that_changes_all_the_time_is_followed_ever_less(sim, halves, monkeypatch):
    model, attachment = halves
    made, make = [], attachment.make_plan
    begun = attachment.layers[0].times
    monkeypatch.setattr(attachment, "make_plan", lambda *args: (made.append(begun.uses), make(*args))[1])
    for step in range(24 * LOOK_AT_LINK_STEPS):
        slow = step // (3 * LOOK_AT_LINK_STEPS) % 2
        sim.set_bandwidth(h2d=LAYER_BYTES / LONG_S / (3 if slow else 1))
        steps(model, 1, 1)
    first, *others = sorted(set(made))
    assert first < 4, "what was measured"
    assert len(others) == 1, "the first change lasts for two looks at the link, and none for four"
    sim.set_bandwidth(h2d=LAYER_BYTES / LONG_S)
    steps(model, 1, 6 * LOOK_AT_LINK_STEPS)
    assert len(set(made)) == 3


@pytest.mark.simgpu
def test_a_link_that_stays_as_it_is_makes_no_other_plan(halves, monkeypatch):
    model, attachment = halves
    steps(model, 1, 6)
    monkeypatch.setattr(attachment, "make_plan", lambda *args: 1 / 0)
    steps(model, 1, 3 * LOOK_AT_LINK_STEPS)


@pytest.mark.simgpu
def test_a_work_that_comes_back_is_not_measured_again(halves, monkeypatch):
    model, attachment = halves
    steps(model, 1, 6)
    first = resident(attachment)
    steps(model, 2, 6)
    assert resident(attachment) != first
    profiled = []
    monkeypatch.setattr(attachment.adaptation.profile, "begin", lambda *work: profiled.append(work))
    steps(model, 1, 3)
    assert not profiled
    steps(model, 3, 1)
    assert profiled
    assert resident(attachment) == first


@pytest.mark.simgpu
def test_residents_are_not_moved_for_a_run_that_is_nearly_over(halves):
    model, attachment = halves
    attachment.run.begin(6)
    steps(model, 1, 6)
    before = resident(attachment)
    attachment.run.begin(3)
    steps(model, 2, 3)
    assert resident(attachment) == before
    attachment.run.begin(20)
    steps(model, 2, 2)
    assert resident(attachment) != before
    assert not messages()


def plan_of(resident, step_s):
    return Plan(resident, ring_bytes=100, step_s=step_s, bound_s=step_s, budget_bytes=200, message=None)


def test_a_plan_that_saves_one_percent_of_a_step_is_worth_moving_for_and_a_quarter_percent_is_not():
    # Nine layers of 100 bytes, one of them resident, over a link of 100 bytes/s: a step takes 8 s.
    layers = [
        SimpleNamespace(
            name=str(i),
            payload_bytes=100,
            elements=1,
            times=LayerTimes(Measured(0.0, 0.0)),
            resident=b"" if i == 0 else None,
        )
        for i in range(9)
    ]
    present = plan_of(("0",), 8.0)
    found = gain(plan_of(("1",), 7.92), present, layers, 100.0)
    assert found is not None
    assert found == pytest.approx((0.08, 1.0))
    assert found.pays_within(14)
    assert not found.pays_within(13)
    assert gain(plan_of(("1",), 7.98), present, layers, 100.0) is None


@pytest.mark.simgpu
@pytest.mark.parametrize(("name", "share"), [("Q8_0", ASSUMED_UNPACKING), ("F16", 1.0)])
def test_what_is_computed_with_where_it_lies_is_taken_to_be_read_as_long_as_it_computes(name, share):
    linear = torch.nn.Linear(256, 256, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(sm.packed_weight(name, (256, 256)).with_dtype(torch.float16), False)
    with attached(torch.nn.Sequential(linear), device="cpu", location="cpu") as attachment:
        (cost,) = costs(attachment.layers)
    assert cost.read_s == pytest.approx(cost.compute_s * share)


def test_a_device_whose_events_tell_no_times_is_not_measured(halves, monkeypatch):
    model, attachment = halves
    monkeypatch.setattr(type(attachment.device), "has_clock", False)
    steps(model, 1, 6)
    assert all(layer.times.measured is None and not layer.times.by_work for layer in attachment.layers)


def test_a_device_with_one_queue_has_no_clock_but_the_host_s():
    assert device_of("cpu").has_clock
    metal = Device(torch.device("mps"))
    assert not metal.has_clock
    first, then = metal.new_event(timing=True), metal.new_event(timing=True)
    then.record(None)
    first.record(None)
    assert first.elapsed_time(then) <= 0, "a span that ends before it begins is an answer, not an error"


def test_a_work_is_the_shapes_of_the_tensors_that_a_forward_gets():
    x, context = torch.zeros(2, 3), torch.zeros(1, 5, 7)
    work = work_of("root", (x, 1.0), {"context": context, "options": {}})
    assert work.shapes == ((2, 3), (1, 5, 7))
    assert work == work_of("root", (x + 1,), {"context": context.half()})
    assert work != work_of("root", (x[:1],), {"context": context})
    assert work != work_of("another", (x,), {"context": context})


def test_the_works_that_are_remembered_are_limited():
    profile = Profile(device_of("cpu"))
    layer = SimpleNamespace(times=LayerTimes())
    for rows in range(10 * KEPT_WORKS):
        work = work_of("root", (torch.zeros(rows),), {})
        layer.times.by_work[work] = Measured(1.0, 1.0)
        assert not profile.has_measured(work)
        profile.begin(work, [layer])
    assert len(profile._begun) == KEPT_WORKS
    assert len(layer.times.by_work) == KEPT_WORKS

"""Residents come to the device while the first step computes, and models take turns without moving more than
that."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
from machine_speed import comparable_seconds

from lib_qswap.swap import ledger, planner, plans
from lib_qswap.swap.manager import attach, attached
from lib_qswap.swap.uploads import Uploads

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("engine")]

GPU = "simgpu"
LINK = 200e6
COUNT = 128
BYTES = [(128, 256, 64, 192)[i % 4] * 2048 for i in range(COUNT)]
RING = 4 * max(BYTES)


class Busy(torch.nn.Module):
    """Layers of several sizes that keep the device busy for a set time each, instead of computing."""

    def __init__(self, sim, layer_s, order=None, sizes=BYTES):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(1024, nbytes // 2048, bias=False, dtype=torch.float16).requires_grad_(False)
            for nbytes in sizes
        )
        for layer in self.layers:
            layer.forward = lambda x: (sim.busy(layer_s), x)[1]
        self.order = order or range(len(sizes))

    def forward(self, x):
        for i in self.order:
            x = self.layers[i](x)
        return x


def seconds_of_steps(models):
    """What one step of each of `models` takes on the device, one after the other."""
    stream, marks = torch.simgpu.current_stream(), []
    x = torch.ones(1, dtype=torch.float16, device=GPU)
    with torch.inference_mode():
        for model in [*models, None]:
            marks.append(torch.simgpu.Event(enable_timing=True))
            marks[-1].record(stream)
            if model is not None:
                model(x)
    torch.simgpu.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in itertools.pairwise(marks)]


@pytest.mark.usefixtures("virtual_time", "compute_mode")
@pytest.mark.parametrize(
    ("location", "resident"), [("shared", 0.25), ("shared", 0.75), ("shared", 1.0), ("cpu", 0.5)]
)
@pytest.mark.parametrize("compute_share", [2.0, 0.6, 0.1])
def test_residents_are_uploaded_while_the_first_step_computes(sim, location, resident, compute_share):
    """`compute_share`: of the time that all bytes take over the link."""
    sim.set_bandwidth(h2d=LINK, latency=0)
    whole_s = sum(BYTES) / LINK
    model = Busy(sim, compute_share * whole_s / COUNT)
    options = (
        {"budget_bytes": sum(BYTES)}
        if resident == 1
        else {
            "budget_bytes": round(sum(BYTES) * resident) + RING,
            "ring_bytes": RING,
        }
    )
    with attached(model, device=GPU, location=location, **options) as attachment:
        for _ in range(2):
            first_s, *_, later_s = seconds_of_steps([model] * 4)
            uploaded = attachment.resident_bytes
            assert uploaded == pytest.approx(sum(BYTES) * resident, rel=0.05)
            assert first_s <= (later_s + uploaded / LINK) * 1.02
            # Compute goes on meanwhile: every byte crosses the link once, and that is all.
            assert first_s <= max(compute_share, 1) * whole_s * 1.02
            attachment.unload()
            attachment.rebalance(options["budget_bytes"])


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize("seed", range(3))
def test_residents_that_are_used_in_another_order_than_was_known_are_there(sim, compute_mode, seed):
    sim.set_bandwidth(h2d=LINK)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(seed)).tolist()
    model = Busy(sim, 1e-4, order)
    used = {}
    for layer in model.layers:
        layer.forward = lambda x, layer=layer: (used.__setitem__(layer, layer.weight.detach().clone()), x)[1]
    weights = [layer.weight.detach().clone() for layer in model.layers]
    budget = sum(BYTES) // 2
    with attached(model, device=GPU, location="shared", budget_bytes=budget, ring_bytes=RING) as attachment:
        for _ in range(2):
            used.clear()
            seconds_of_steps([model])
            for layer, weight in zip(model.layers, weights, strict=True):
                assert torch.equal(used[layer].cpu(), weight)
        attachment.rebalance(budget + (1 << 20))
        attachment.unload()  # what was to be uploaded is not
        attachment.rebalance(budget)
        used.clear()
        seconds_of_steps([model])
        assert all(
            torch.equal(used[layer].cpu(), weight)
            for layer, weight in zip(model.layers, weights, strict=True)
        )


@pytest.mark.usefixtures("virtual_time")
def test_residents_are_uploaded_in_their_turn_although_the_order_of_execution_is_another_one(
    sim, compute_mode
):
    # Pairs run the other way round than they are defined, as streams of a block do.
    order = [i ^ 1 for i in range(COUNT)]
    model = Busy(sim, 1e-4, order)
    begun = {}
    budget = sum(BYTES) // 2
    with attached(model, device=GPU, location="shared", budget_bytes=budget, ring_bytes=RING) as attachment:
        layers = {layer.module(): layer for layer in attachment.layers}
        uploads = [layer.resident_ready for layer in layers.values() if layer.resident_ready is not None]
        for at, i in enumerate(order):
            module = model.layers[i]
            forward = module.forward

            def counting(x, at=at, forward=forward):
                begun[at] = sum(upload.submitted for upload in uploads)
                return forward(x)

            module.forward = counting
        seconds_of_steps([model])
    assert len(uploads) >= 8
    assert begun[COUNT // 4] < len(uploads) * 3 // 4
    assert begun[COUNT - 1] == len(uploads)


@pytest.mark.usefixtures("virtual_time")
def test_a_resident_is_reported_as_such_when_it_has_arrived(sim, compute_mode):
    sim.set_bandwidth(h2d=LINK)
    model = Busy(sim, 1e-3)
    options = {"budget_bytes": sum(BYTES) // 2, "ring_bytes": RING}
    with attached(model, device=GPU, location="shared", **options) as attachment:
        resident = {layer.name for layer in attachment.layers if layer.resident is not None}

        def reported():
            layers = ledger.model_snapshot(attachment)["layers"]
            return {layer["name"] for layer in layers if layer["state"] == "resident"}

        assert reported() == set()
        attachment.begin_uploads()
        sim.synchronize()
        assert reported() == resident
        attachment.unload()
        attachment.rebalance(options["budget_bytes"])
        assert reported() == set()
        seconds_of_steps([model])
        assert reported() == resident


@pytest.mark.usefixtures("virtual_time")
def test_models_take_turns_at_no_more_than_their_bytes_over_the_link(sim, compute_mode):
    """Text encoder, transformer, VAE and back, on a device that has not room for all."""
    sim.set_bandwidth(h2d=LINK, d2h=LINK, latency=0)
    layer_s = sum(BYTES) / LINK / COUNT
    sizes = {"encoder": BYTES[:64], "transformer": BYTES, "vae": BYTES[:24]}
    models = {name: Busy(sim, layer_s, sizes=of) for name, of in sizes.items()}
    budgets = {name: sum(of) * 5 // 8 + RING for name, of in sizes.items()}
    attachments = {
        name: attach(model, device=GPU, location="shared", budget_bytes=0, ring_bytes=RING)
        for name, model in models.items()
    }
    for attachment in attachments.values():
        attachment.unload()
    sim.set_total(budgets["transformer"] + (1 << 20))
    for turn in range(2):
        for name, model in models.items():
            sim.synchronize()
            sim.reset_stats()
            begun_s = sim.now()
            for other, attachment in attachments.items():
                if other != name:
                    attachment.rest()
                    attachment.unload()
            attachment = attachments[name]
            attachment.rebalance(budgets[name])
            assert sim.now() - begun_s < 1e-4, "something waited for a copy"
            first_s, *_, later_s = seconds_of_steps([model] * 3)
            uploaded = attachment.resident_bytes
            assert uploaded >= sum(sizes[name]) // 2
            assert first_s <= (later_s + uploaded / LINK) * 1.02, (turn, name)
            stats = sim.stats()
            assert stats["d2h_pinned_bytes"] + stats["d2h_pageable_bytes"] == 0
            attachment.rest()
            attachment.wake()
            (again_s,) = seconds_of_steps([model])
            assert again_s <= (later_s + attachment.state.streamer.ring_bytes / LINK) * 1.02
    for attachment in attachments.values():
        attachment.detach()


def test_models_that_take_turns_keep_the_worker_and_its_page_locked_buffers(sim, compute_mode):
    models = [Busy(sim, 0) for _ in range(2)]
    attachments = [attach(m, device=GPU, location="cpu", budget_bytes=RING, ring_bytes=RING) for m in models]
    state = attachments[0].state
    worker, locked = state.copier._thread, sim.stats()["registered_bytes"]
    assert locked == state.copier.staging_locked_bytes > 0
    for _ in range(2):
        for attachment, model in zip(attachments, models, strict=True):
            attachments[0].rest()
            attachments[1].unload()
            attachment.rebalance(RING)
            seconds_of_steps([model])
            assert state.copier._thread is worker
    attachments[0].detach()
    assert state.copier._thread is worker
    attachments[1].unload()
    attachments[1].detach()
    assert not worker.is_alive()
    assert sim.stats()["registered_bytes"] == 0


def test_unloading_hundreds_of_layers_takes_the_host_microseconds_each(sim):
    sizes = [2 * 2048 * 16] * 300
    model = Busy(sim, 0, sizes=sizes)
    with attached(model, device=GPU, location="shared", budget_bytes=1 << 30) as attachment:
        took = []

        def leave():
            attachment.rest()
            attachment.unload()

        for _ in range(5):
            seconds_of_steps([model])
            took.append(comparable_seconds(leave))
            attachment.rebalance(1 << 30)
        # About 10 each in a process of its own, 22 at the end of a long one.
        assert min(took) < 50e-6 * len(sizes)


class Waiting:
    """A layer as `Uploads` sees it."""

    def __init__(self, name, waits):
        self.name = name
        self.resident_ready = types.SimpleNamespace(submitted=False) if waits else None


def test_only_what_the_running_part_of_a_model_uses_is_uploaded_and_each_once():
    layers = {name: Waiting(name, name in "acdf") for name in "abcdef"}
    uploads = Uploads()
    uploads.expect("encoder", list(layers.values()))

    def sent(swapped):
        found = uploads.before(layers[swapped] if swapped else None)
        for layer in found:
            layer.resident_ready.submitted = True
        return "".join(layer.name for layer in found)

    assert sent("b") == ""  # nothing runs yet
    uploads.begin("decoder")
    assert sent("b") == sent(None) == ""
    uploads.begin("encoder")
    assert sent("b") == "a"
    assert sent("b") == ""
    layers["c"].resident_ready = None  # evicted meanwhile
    uploads.begin("encoder")  # its first forward broke off
    assert sent("e") == "d"
    assert sent("b") == "", "out of turn: no reason to bring what comes later"
    assert sent(None) == "f"
    uploads.expect("encoder", [Waiting("g", True)])
    uploads.forget("encoder")
    uploads.begin("encoder")
    assert sent(None) == ""


# ------------------------------------------------------------------------------------------ plans made before
def test_a_model_that_comes_back_gets_its_plan_without_another_search(monkeypatch):
    layers = [planner.LayerCost(str(i), 1000 + i, 1e-6) for i in range(100)]
    total = sum(layer.nbytes for layer in layers)
    asked = []

    def make_plan(*args, **kwargs):
        asked.append(kwargs)
        return plan(*args, **kwargs)

    plan = planner.make_plan
    monkeypatch.setattr(planner, "make_plan", make_plan)
    kept = plans.Plans()

    def make(budget, link=1e9, costs=layers):
        searched = len(asked)
        made = kept.make(costs, budget_bytes=budget, link_bytes_per_s=link)
        resident = set(made.resident)
        used = sum(layer.nbytes for layer in costs if layer.name in resident) + made.ring_bytes
        assert used <= made.budget_bytes == max(budget, max(layer.nbytes for layer in costs))
        predicted = planner.predict_step(
            costs, made.resident, ring_bytes=made.ring_bytes, link_bytes_per_s=link
        )
        assert made.step_s == pytest.approx(predicted)
        return made, len(asked) > searched

    first, searched = make(total // 2)
    assert searched
    assert make(total // 2) == (first, False)
    again, searched = make(total // 2 + total // 200, link=1.03e9)
    assert (again.resident, searched) == (first.resident, False)
    for link in (3e8, 5e8, 7e8, 2e9):  # of another bandwidth: where it is as good as any
        made, searched = make(total // 2, link=link)
        assert searched or made.step_s <= 1.005 * made.bound_s
    searches = len(asked)
    # More room, less than the plan needs, other times: another plan.
    assert make(total * 6 // 10)[1]
    assert make(total * 4 // 10)[1]
    assert make(total // 2, costs=[layer._replace(compute_s=2e-6) for layer in layers])[1]
    # Everything fits, or nothing but the largest layer does.
    assert make(total - 1)[1]
    whole, searched = make(total)
    assert searched
    assert len(whole.resident) == len(layers)
    assert make(total * 2)[0].resident == whole.resident
    assert len(make(total - 1)[0].resident) < len(layers)
    assert make(10)[0].message
    assert make(10) == (make(10)[0], False)
    assert len(asked) == searches + 6

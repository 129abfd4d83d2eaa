"""Small layers that follow each other come in one copy, and are used, dropped and waited for one by one."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from test_streamer import F32, GPU, Steps, call, expected

from lib_qswap.swap import arena, copier, streamer
from lib_qswap.swap.manager import attach
from lib_qswap.swap.transfer import Transfer

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("engine")]

COUNT = 40
LAYER_BYTES = 69_632  # of 256 x 256 weights of Q8_0


def swapped(count=COUNT, ring_layers=12, location="shared", seed=0, **options):
    """A model whose layers are all swapped, and its attachment."""
    model = Steps(count, seed=seed)
    outputs = expected(model)
    attachment = attach(
        model,
        device=GPU,
        location=location,
        budget_bytes=0,
        ring_bytes=ring_layers * LAYER_BYTES,
        **F32,
        **options,
    )
    attachment.rebalance(
        attachment.fixed_bytes + attachment.scratch_bytes + ring_layers * LAYER_BYTES + LAYER_BYTES // 2
    )
    assert all(layer.payload_bytes == LAYER_BYTES for layer in attachment.layers)
    return model, attachment, outputs


def copies(sim, run) -> int:
    sim.synchronize()
    before = sim.stats()["h2d_pinned_n"]
    run()
    sim.synchronize()
    return sim.stats()["h2d_pinned_n"] - before


def steps(model, count=3):
    return [call(model) for _ in range(count)]


@pytest.mark.parametrize("ring_layers", [3, 5, 12, 13, 31])
@pytest.mark.usefixtures("compute_mode")
def test_a_step_takes_fewer_copies_and_gives_the_same(sim, ring_layers):
    model, attachment, outputs = swapped(ring_layers=ring_layers)
    steps(model, 4)  # Traced, measured, planned.
    swapped_now = sum(layer.resident is None for layer in attachment.layers)
    streams = attachment.state.streamer
    least_bytes = streamer.SLOWEST_LINK_BYTES_PER_S * streamer.TOGETHER_COPY_S
    most = min(least_bytes, streams.ring_bytes // streamer.TOGETHER_RING_SHARE) // LAYER_BYTES
    taken = copies(sim, lambda: [torch.testing.assert_close(one, outputs) for one in steps(model)])
    # The input of each step is a copy too; where the ring begins anew a run is cut.
    assert taken <= 3 * (1 + -(-swapped_now // max(1, most)) * 2)
    assert taken >= 3 * swapped_now // max(1, most)
    assert streams.misses <= COUNT, "of the first step alone"
    attachment.detach()


@pytest.mark.usefixtures("compute_mode")
def test_what_is_used_out_of_turn_is_served(sim):
    model, attachment, _ = swapped()
    for order in (
        None,
        None,
        [*range(0, COUNT, 2), *range(1, COUNT, 2)],
        list(range(COUNT))[::-1],
        [3] * 5,
        None,
    ):
        torch.testing.assert_close(call(model, order), expected(model, order))
    attachment.detach()


def test_a_step_that_breaks_off_leaves_nothing_behind(sim):
    model, attachment, outputs = swapped()
    steps(model)
    for position in (1, 7, COUNT - 1):
        model.fail_at = position
        with pytest.raises(RuntimeError, match="stopped by the test"):
            call(model)
        model.fail_at = None
        torch.testing.assert_close(call(model), outputs)
    attachment.detach()


def test_a_copy_is_waited_for_once_and_what_it_overwrites_is_marked_once(sim, monkeypatch):
    model, attachment, outputs = swapped(ring_layers=24)
    steps(model, 4)
    calls = {"record": 0, "wait": 0}

    def counting(name):
        original = getattr(sim.Event, name)

        def count(event, stream=None):
            calls[name] += 1
            return original(event, stream)

        monkeypatch.setattr(sim.Event, name, count)

    list(map(counting, calls))
    swapped_now = sum(layer.resident is None for layer in attachment.layers)
    taken = copies(sim, lambda: steps(model, 1)) - 1
    assert taken < swapped_now / 2
    # When a layer asks for its weights is recorded; before and behind each copy; the step's begin and end;
    # and what has been read, where something is to be written over it: twice where the ring begins anew.
    assert calls["record"] <= swapped_now + 2 * taken + 2 + taken + 2
    # The compute stream for each copy, the copy stream for what lay there.
    assert calls["wait"] <= 2 * taken + 2
    monkeypatch.undo()
    torch.testing.assert_close(steps(model)[-1], outputs)
    attachment.detach()


def test_transfers_that_came_together_go_without_the_garbage_collector(sim):
    model, attachment, _ = swapped(ring_layers=24)
    steps(model, 10)
    sim.synchronize()
    gc.collect()
    gc.disable()
    try:
        steps(model, 30)
        assert transfers_alive() <= 10 * COUNT, "more than those of the steps that are kept"
        attachment.detach()
        assert transfers_alive() == 0, "the ring's memory and the layers' would stay with them"
    finally:
        gc.enable()


def transfers_alive() -> int:
    return sum(type(one) is Transfer for one in gc.get_objects())


def test_large_layers_and_staged_ones_have_copies_of_their_own(sim, monkeypatch):
    monkeypatch.setattr(streamer, "SMALL_COPY_S", LAYER_BYTES / 100e9)
    model, attachment, outputs = swapped()
    attachment.state.streamer.use_link(99e9)
    steps(model)
    swapped_now = sum(layer.resident is None for layer in attachment.layers)
    assert copies(sim, lambda: steps(model, 1)) >= swapped_now
    attachment.detach()
    monkeypatch.undo()
    model, attachment, outputs = swapped(location="cpu")
    assert attachment.state.copier.staged
    torch.testing.assert_close(steps(model)[-1], outputs)
    attachment.detach()


def test_masters_that_lie_apart_are_not_copied_together(sim, monkeypatch):
    monkeypatch.setattr(arena, "TOGETHER_BYTES", LAYER_BYTES)
    monkeypatch.setattr(arena, "CHUNK_BYTES", 10 * LAYER_BYTES)
    model, attachment, outputs = swapped()
    homes = [layer.home for layer in attachment.layers]
    assert not any(b.follows(a) for a, b in itertools.pairwise(homes))
    torch.testing.assert_close(steps(model)[-1], outputs)
    assert copies(sim, lambda: steps(model, 1)) >= sum(x.resident is None for x in attachment.layers)
    attachment.detach()


def test_small_layers_lie_together_although_arenas_are_dealt(sim, monkeypatch):
    monkeypatch.setattr(arena, "TOGETHER_BYTES", 8 * LAYER_BYTES)
    monkeypatch.setattr(arena, "CHUNK_BYTES", 64 * LAYER_BYTES)
    _model, attachment, _ = swapped(160)
    homes = [layer.home for layer in attachment.layers]
    assert len({id(home.owner) for home in homes}) == 3
    follow = [b.follows(a) for a, b in itertools.pairwise(homes)]
    assert follow == [(i + 1) % 8 != 0 for i in range(159)]
    attachment.detach()


def test_what_goes_wrong_with_a_copy_is_told_by_each_of_its_layers(sim, monkeypatch):
    model, attachment, outputs = swapped()
    steps(model)

    def broken(_work):
        raise RuntimeError("the copy broke")

    with monkeypatch.context() as patch:
        patch.setattr(copier, "_copy_locked", broken)
        # What was fetched ahead before is right.
        with pytest.raises(RuntimeError, match="the copy broke"):
            steps(model)
    torch.testing.assert_close(steps(model)[-1], outputs)
    attachment.detach()


@pytest.mark.usefixtures("virtual_time")
def test_the_timeline_counts_a_copy_once(sim):
    sim.set_bandwidth(200e6, 100e6, 200e6, 0)
    model, attachment, _ = swapped()
    steps(model, 4)
    timeline = attachment.state.streamer.timeline
    timeline.collect()
    step = timeline.finished[-1]
    swapped_now = sum(layer.resident is None for layer in attachment.layers)
    assert step.h2d_bytes == swapped_now * LAYER_BYTES
    assert step.h2d_bytes / step.copy_s == pytest.approx(200e6, rel=0.05)
    attachment.detach()

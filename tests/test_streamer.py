"""Handing out layers: served correctly in any order, fetched ahead where the order is known, never stuck."""

from __future__ import annotations

import gc
import math
import threading

import pytest
import swap_models as sm
import torch

from lib_qswap.quant.packed import PackedTensor
from lib_qswap.swap import adaptation, ledger
from lib_qswap.swap.device import Device
from lib_qswap.swap.manager import attach, attached

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("engine")]

GPU = "simgpu"
F32 = {"compute_dtype": torch.float32}
LATE_S = 20.0  # what comes after that did not come


class Steps(torch.nn.Module):
    """Linear layers run in the order that each call asks for."""

    def __init__(self, count=6, *, fail_at=None, seed=0):
        super().__init__()
        weights = [sm.packed_weight("Q8_0", (256, 256), seed * 100 + i) for i in range(count)]
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(256, 256, bias=False, device="meta") for _ in weights
        )
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.fail_at = fail_at

    def forward(self, x, order=None):
        for position, i in enumerate(range(len(self.layers)) if order is None else order):
            if position == self.fail_at:
                raise RuntimeError("stopped by the test")
            x = torch.tanh(self.layers[i](x) * 0.05) + x
        return x


X = torch.linspace(-1, 1, 512).view(2, 256)


def expected(model, order=None):
    weights = [layer.weight.detach().dequantize(torch.float32) for layer in model.layers]
    x = X
    for i in range(len(weights)) if order is None else order:
        x = torch.tanh(torch.nn.functional.linear(x, weights[i]) * 0.05) + x
    assert x.isfinite().all()
    assert x.std() > 0.1
    return x


def call(model, order=None, device=GPU):
    with torch.inference_mode():
        return model(X.to(device), order).cpu()


def swapped(model, device=GPU, *, rings=2.0, location="shared", **options):
    """Attached with nothing resident and a ring of `rings` layers."""
    layer_bytes = 256 * 256 // 32 * 34
    ring = int(rings * layer_bytes)
    budget = ring + 256 * 256 * 4
    return attached(
        model, device=device, location=location, budget_bytes=budget, ring_bytes=ring, **F32, **options
    )


# -------------------------------------------------------------------------------------- orders of all kinds
@pytest.mark.parametrize("location", ["shared", "cpu"])
def test_layers_out_of_order_repeated_or_skipped_are_served_correctly_and_counted(
    sim, compute_mode, location
):
    model = Steps()
    orders = [[5, 4, 3, 2, 1, 0], [0, 0, 0], [2], [0, 2, 4], [1, 3, 1, 5, 1, 3], [], list(range(6)) * 2]
    with_weights = [expected(model, order) for order in orders if order]
    with swapped(model, location=location) as attachment:
        streamer = attachment.state.streamer
        assert torch.equal(call(model), call(model))
        assert streamer.misses == 0
        for order, right in zip([order for order in orders if order], with_weights, strict=True):
            before = streamer.misses
            assert torch.equal(call(model, order), right), order
            assert streamer.misses > before or order == [0, 2, 4] or order == list(range(6)) * 2, order
            assert torch.equal(call(model, order), right), order
            known = streamer.misses
            assert torch.equal(call(model, order), right), order
            assert torch.equal(call(model, order), right), order
            assert streamer.misses == known, f"{order} is not predicted although it came again and again"
        assert torch.equal(call(model, []), X)
        assert streamer.overflows == 0


@pytest.mark.parametrize("rings", [1.0, 1.5, 3.0])
def test_orders_that_change_with_every_call_are_served_correctly(sim, compute_mode, rings):
    model = Steps()
    orders = [torch.randperm(6, generator=torch.Generator().manual_seed(i)).tolist() for i in range(6)]
    right = [expected(model, order) for order in orders]
    with swapped(model, rings=rings):
        for order, result in zip(orders, right, strict=True):
            assert torch.equal(call(model, order), result)


def test_models_that_alternate_within_a_step_are_predicted(sim, compute_mode):
    control, unet = Steps(3, seed=1), Steps(5, seed=2)
    right = expected(control), expected(unet)
    with swapped(control) as attachment, swapped(unet):
        streamer = attachment.state.streamer
        for step in range(6):
            if step == 3:
                known = streamer.misses
            assert torch.equal(call(control), right[0])
            assert torch.equal(call(unet), right[1])
        assert streamer.misses == known
        for _ in range(2):  # the ControlNet's part is over
            assert torch.equal(call(unet), right[1])
        known = streamer.misses
        assert torch.equal(call(unet), right[1])
        assert streamer.misses == known


# ------------------------------------------------------------------------------------------------- fetching
def fetched_bytes(attachment):
    return attachment.state.copier.h2d_bytes


def test_a_known_run_fetches_each_layer_once_a_step_and_nothing_after_the_last(sim, compute_mode):
    model = Steps()
    with swapped(model, rings=4) as attachment:
        before = fetched_bytes(attachment)
        attachment.run.begin(5)
        for _ in range(5):
            call(model)
        attachment.run.end()
        assert fetched_bytes(attachment) - before == 5 * attachment.payload_bytes
        assert attachment.state.streamer.misses == 0


def test_an_encoder_that_runs_once_is_fetched_once(sim, compute_mode):
    model = Steps()
    with swapped(model, rings=4) as attachment:
        before = fetched_bytes(attachment)
        call(model)
        assert fetched_bytes(attachment) - before == attachment.payload_bytes


NEIGHBOURS_SWAPPED = [2, 0, 1, 3, 5, 4, 7, 6, 8, 9, 11, 10]
TWO_STREAMS = [0, 5, 1, 6, 2, 3, 4, 7, 8, 9, 10, 11]  # as Flux defines one stream of a block after the other


@pytest.mark.parametrize("location", ["shared", "cpu"])
@pytest.mark.parametrize(
    ("order", "misses"), [(NEIGHBOURS_SWAPPED, 0), (TWO_STREAMS, 2)], ids=["neighbours", "two streams"]
)
def test_layers_that_run_in_another_order_than_they_are_defined_in_are_fetched_once(
    sim, compute_mode, location, order, misses
):
    model = Steps(12)
    right = expected(model, order)
    with swapped(model, rings=4, location=location) as attachment:
        streamer = attachment.state.streamer
        attachment.run.begin(1)
        before = fetched_bytes(attachment)
        assert torch.equal(call(model, order), right)
        assert streamer.misses == misses
        layer_bytes = attachment.layers[0].payload_bytes
        # What gives way to a layer that nobody expected is fetched again: one layer for each.
        assert fetched_bytes(attachment) - before <= attachment.payload_bytes + misses * layer_bytes


def test_the_order_of_execution_is_still_known_when_a_model_comes_back(sim, compute_mode):
    model = Steps(12)
    with swapped(model, rings=2) as attachment:
        streamer = attachment.state.streamer
        call(model, TWO_STREAMS)
        for _ in range(3):
            attachment.unload()
            attachment.rebalance(attachment.fixed_bytes + attachment.scratch_bytes + 2 * 256 * 256 // 32 * 34)
            attachment.run.begin(1)
            before, misses = fetched_bytes(attachment), streamer.misses
            call(model, TWO_STREAMS)
            assert streamer.misses == misses
            assert fetched_bytes(attachment) - before == attachment.payload_bytes


def test_layers_that_are_skipped_from_now_on_do_not_clog_the_ring(sim, compute_mode):
    model = Steps(12)
    short = [0, 7, 8, 9, 10, 11]
    right = expected(model, short)
    with swapped(model, rings=3) as attachment:
        streamer = attachment.state.streamer
        call(model)
        call(model)
        attachment.run.begin(1)
        before, misses = fetched_bytes(attachment), streamer.misses
        assert torch.equal(call(model, short), right)
        assert streamer.misses - misses <= 2
        ahead = 3  # were fetched before anybody knew
        assert fetched_bytes(attachment) - before <= (len(short) + ahead) * attachment.layers[0].payload_bytes
        assert streamer.overflows == 0


def test_the_end_of_a_step_fetches_the_start_of_the_next(sim):
    model = Steps()
    with swapped(model, rings=3) as attachment:
        attachment.run.begin(3)
        call(model)
        sim.synchronize()
        states = attachment.state.streamer.states()
        assert {layer.name: state for layer, state in states.items()} == {
            "layers.0": "ready",
            "layers.1": "ready",
            "layers.2": "ready",
        }


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize("location", ["shared", "cpu"])
def test_a_slot_is_filled_again_while_its_layer_computes_with_the_unpacked_weight(
    sim, compute_mode, location
):
    model = Steps(8)
    layer_bytes, busy_s = 256 * 256 // 32 * 34, 0.01
    for layer in model.layers:
        layer.forward = lambda x: (sim.busy(busy_s), x)[1]
    sim.set_bandwidth(h2d=layer_bytes / busy_s)
    with swapped(model, rings=1, location=location) as attachment:
        for _ in range(6):
            call(model)
        timeline = attachment.state.streamer.timeline
        timeline.collect()
        # One copy after the other, each while the layer before computes: not 16 in turn. The host waits
        # between steps here, so that the first one may begin with its step.
        assert 8 * busy_s * 0.999 <= timeline.finished[-1].seconds <= 9 * busy_s * 1.01
        assert attachment.layers[3].times.measured == pytest.approx((busy_s, 0.0), abs=1e-6)


class Biased(torch.nn.Module):
    """Linear layers whose biases come with their weights."""

    def __init__(self, count=6):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(256, 256, device="meta") for _ in range(count))
        for i, layer in enumerate(self.layers):
            weight, bias = sm.packed_weight("Q8_0", (256, 256), i), torch.linspace(-i, i + 1, 256)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            layer.bias = torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class OwnForward(torch.nn.Linear):
    """Computes with its parameters as it finds them."""

    def forward(self, x):
        bias = self.bias.dequantize(x.dtype) if isinstance(self.bias, PackedTensor) else self.bias
        return torch.nn.functional.linear(x, self.weight, bias)


def test_a_packed_bias_is_unpacked_before_its_slot_is_filled_again(sim, compute_mode):
    model = Biased()
    biases = [sm.packed_weight("Q8_0", (256,), 100 + i) for i in range(len(model.layers))]
    x = X
    for layer, bias in zip(model.layers, biases, strict=True):
        layer.__class__ = OwnForward
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        weight = layer.weight.detach().dequantize(torch.float32)
        x = torch.tanh(torch.nn.functional.linear(x, weight, bias.dequantize(torch.float32)))
    ring = model.layers[0].weight.packed_nbytes + 512
    options = {"compute_dtype": torch.float32, "ring_bytes": ring, "budget_bytes": 1}
    with attached(model, device=GPU, location="shared", **options), torch.inference_mode():
        for _ in range(4):
            assert torch.equal(model(X.to(GPU)).cpu(), x)


@pytest.mark.parametrize("compute_dtype", [torch.float32, None], ids=["room", "no room"])
def test_a_bias_is_read_before_its_slot_is_filled_again(sim, compute_mode, compute_dtype):
    model = Biased()
    x = X
    for layer in model.layers:
        weight = layer.weight.detach().dequantize(torch.float32)
        x = torch.tanh(torch.nn.functional.linear(x, weight, layer.bias.detach()))
    ring = model.layers[0].weight.packed_nbytes + 1024
    # "No room": the scratch is for half precision, and grows for a weight in single precision, not its bias.
    options = {"compute_dtype": compute_dtype, "ring_bytes": ring, "budget_bytes": 1}
    with attached(model, device=GPU, location="shared", **options) as attachment, torch.inference_mode():
        for _ in range(4):
            assert torch.equal(model(X.to(GPU)).cpu(), x)
        assert attachment.state.streamer.overflows == 0


# ------------------------------------------------------------------------------------------------ accidents
def test_a_forward_that_raises_midway_does_not_disturb_the_next_one(sim, compute_mode):
    model = Steps()
    right = expected(model)
    with swapped(model) as attachment:
        for stop in (0, 3, 5, 1):
            model.fail_at = stop
            with pytest.raises(RuntimeError, match="stopped by the test"):
                call(model)
            model.fail_at = None
            assert torch.equal(call(model), right)
        misses = attachment.state.streamer.misses
        sim.synchronize()
        assert "in_use" not in attachment.state.streamer.states().values()
        model.fail_at = 2
        with pytest.raises(RuntimeError, match="stopped by the test"):
            call(model)
        sim.synchronize()
        assert "in_use" not in attachment.state.streamer.states().values()
        model.fail_at = None
        assert torch.equal(call(model), right)
        assert attachment.state.streamer.misses <= misses + 1


@pytest.mark.parametrize("abandoned", [1, 2])
def test_leases_that_nobody_gave_back_are_reclaimed_at_the_next_step(sim, compute_mode, abandoned):
    model = Steps()
    right = expected(model)
    with swapped(model, rings=2) as attachment:
        call(model)
        attachment.begin_step(model)
        leases = [attachment.acquire(layer) for layer in attachment.layers[:abandoned]]
        assert torch.equal(call(model), right)
        for lease in leases:  # far too late, and harmless
            lease.release()
            lease.release()
        assert torch.equal(call(model), right)
        assert attachment.state.streamer.overflows == 0


def test_leases_nested_deeper_than_the_ring_are_served_from_elsewhere_and_given_back(sim, compute_mode):
    model = Steps()
    weights = [layer.weight.detach().packed.clone() for layer in model.layers]
    with swapped(model, rings=2) as attachment, torch.inference_mode():
        call(model)
        held = sim.memory_allocated()
        attachment.begin_step(model)
        leases = [attachment.acquire(layer) for layer in attachment.layers]
        for lease, weight in zip(leases, weights, strict=True):
            assert torch.equal(lease.parts["weight"].packed.cpu(), weight)
        assert attachment.state.streamer.overflows >= 4
        for lease in reversed(leases):
            lease.release()
        del leases, lease
        gc.collect()
        assert sim.memory_allocated() == held


def test_what_is_fetched_ahead_for_a_model_that_is_dropped_is_dropped_with_it(sim, compute_mode):
    sim.set_bandwidth(h2d=50e6)
    for location in ("shared", "cpu"):
        model = Steps()
        attachment = attach(model, device=GPU, location=location, budget_bytes=0, **F32)
        attachment.run.begin(9)
        call(model)
        assert attachment.state.streamer._ahead
        del model
        assert not attachment.active
        assert not attachment.state.streamer._ahead
        state = attachment.state
        del attachment
        assert state.pin_budget.used_bytes == 0
    sim.synchronize()


def dropped_in_a_cycle(**options):
    """A model that has run and that only the collector frees now; its attachment."""
    model = Steps(seed=1)
    attachment = attach(model, device=GPU, budget_bytes=0, **F32, **options)
    call(model)
    model.itself = [model]
    return attachment


def three_steps(model, attachment):
    """Results of as many steps as a thread gets done in time."""
    results = []

    def steps():
        attachment.begin_step(model)  # begins to fetch, with no layer leased yet
        attachment.state.copier.drain()
        results.extend(call(model) for _ in range(3))

    thread = threading.Thread(target=steps, daemon=True)
    thread.start()
    thread.join(LATE_S)
    return results


@pytest.mark.parametrize("location", ["cpu", "shared"])
def test_a_model_collected_in_the_midst_of_another_ones_step_neither_blocks_nor_spoils_it(
    sim, compute_mode, monkeypatch, location
):
    """Garbage collection runs anywhere: here on the copier's thread, and inside the streamer."""
    from lib_qswap.swap.copier import Copier

    model = Steps()
    right = expected(model)
    begin, armed = Copier._begin, []

    def collecting(self, transfer):
        if armed:
            armed.pop()
            gc.collect()
        begin(self, transfer)

    monkeypatch.setattr(Copier, "_begin", collecting)
    with swapped(model, location=location) as attachment:
        call(model)
        gc.disable()
        try:
            second = dropped_in_a_cycle(location=location)
            pinned = attachment.state.pin_budget.used_bytes
            armed.append(True)
            results = three_steps(model, attachment)
        finally:
            gc.enable()
        assert not armed
        assert len(results) == 3, "the step is stuck"
        assert all(torch.equal(result, right) for result in results)
        assert not second.active
        del second
        gc.collect()
        assert location == "cpu" or attachment.state.pin_budget.used_bytes < pinned


def test_a_model_that_is_collected_on_the_pages_thread_waits_for_the_thread_that_runs_models(
    sim, compute_mode
):
    model = Steps()
    right = expected(model)
    with swapped(model) as attachment:
        call(model)
        gc.disable()
        try:
            second = dropped_in_a_cycle(location="shared")
            pinned = attachment.state.pin_budget.used_bytes
            page = threading.Thread(target=gc.collect)
            page.start()
            page.join()
            # Unloading gives slots back and frees memory: not beside a step.
            assert second.active
            assert torch.equal(call(model), right)
            assert not second.active
        finally:
            gc.enable()
        del second
        assert attachment.state.pin_budget.used_bytes < pinned


def test_a_model_that_is_collected_on_a_readers_thread_does_not_wait_for_itself(
    sim, compute_mode, monkeypatch
):
    from lib_qswap.swap import reader
    from lib_qswap.swap.home import Home

    monkeypatch.setattr(reader, "LEAST_BYTES", 1)
    model = Steps()
    right = expected(model)
    read_into, collected = Home.read_into, []

    def collecting(self, destination, start_byte):
        if armed and not collected and threading.current_thread().name == "qswap-reader":
            collected.append(gc.collect())
        read_into(self, destination, start_byte)

    armed = False
    monkeypatch.setattr(Home, "read_into", collecting)
    with swapped(model, location="cpu") as attachment:
        attachment.state.copier.reader = reader.Reader(threads=2)
        call(model)
        gc.disable()
        try:
            second = dropped_in_a_cycle(location="cpu")
            armed = True
            results = three_steps(model, attachment)
        finally:
            gc.enable()
        assert collected
        assert len(results) == 3, "the step is stuck"
        assert all(torch.equal(result, right) for result in results)
        assert not second.active


def test_the_ring_holds_on_to_nothing_of_a_model_that_is_gone(sim, compute_mode):
    model = Steps()
    with swapped(model) as attachment:
        call(model)
        pinned = attachment.state.pin_budget.used_bytes
        other = Steps(seed=1)
        second = attach(other, device=GPU, location="shared", budget_bytes=0, **F32)
        second.run.begin(1)  # Nothing is fetched for another step into what its layers have left.
        call(other)
        assert attachment.state.pin_budget.used_bytes > pinned
        del other, second
        gc.collect()
        assert attachment.state.pin_budget.used_bytes == pinned


class NotReady:
    """An event of a step of which something still runs on another stream: the device gives no time."""

    def elapsed_time(self, _later):
        raise RuntimeError("device not ready")


def test_a_step_that_cannot_be_read_yet_is_read_later(sim):
    model = Steps()
    with swapped(model) as attachment:
        timeline = attachment.state.streamer.timeline
        call(model)
        sim.synchronize()
        timeline.collect()
        call(model)
        sim.synchronize()
        step = timeline._waiting[-1]
        base, step.base = step.base, NotReady()
        timeline.collect()
        assert ledger.snapshot()["models"]
        assert len(timeline.finished) == 1
        step.base = base
        assert len(timeline.finished) == 2


def test_another_thread_may_use_the_model_afterwards(sim, compute_mode):
    model = Steps()
    right = expected(model)
    with swapped(model) as attachment:
        results = [call(model)]
        for _ in range(2):
            thread = threading.Thread(target=lambda: results.append(call(model)), daemon=True)
            thread.start()
            thread.join(LATE_S)
        results.append(call(model))
        assert [torch.equal(result, right) for result in results] == [True] * 4
        assert attachment.state.streamer.misses == 0


def test_compute_on_a_side_stream_is_ordered_behind_its_weights(sim):
    model = Steps()
    right = expected(model)
    with swapped(model):
        stream = torch.simgpu.Stream()
        stream.wait_stream(torch.simgpu.current_stream())
        for _ in range(3):
            with torch.simgpu.stream(stream), torch.inference_mode():
                x = X.to(GPU)
                result = model(x)
            stream.synchronize()
            assert torch.equal(result.cpu(), right)


def test_a_slot_that_was_taken_when_ctrl_c_came_is_given_back(sim, monkeypatch):
    model = Steps()
    with swapped(model) as attachment:
        streamer = attachment.state.streamer
        call(model)
        own, calls = streamer._in_slot, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return own(*args)

        monkeypatch.setattr(streamer, "_in_slot", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(model)
        monkeypatch.setattr(streamer, "_in_slot", own)
        attachment.rebalance(attachment.budget_bytes)
        before = streamer.overflows
        for _ in range(3):
            call(model)
        assert streamer.overflows == before


def test_steps_whose_times_were_lost_are_measured_again(sim):
    """An encoder, after whose only forward another model has its turn at once."""
    sim.set_async_compute(True)
    sim.set_compute(op_seconds=0.01)
    model = Steps()
    x = X.to(GPU)
    with swapped(model) as attachment, torch.inference_mode():
        for _ in range(2):
            attachment.wake()
            attachment.run.begin(1)
            model(x)
            attachment.rest()
            torch.simgpu.synchronize()
        assert all(layer.times.measured is None for layer in attachment.layers)
        attachment.wake()
        for _ in range(4):
            model(x)
            torch.simgpu.synchronize()
        assert all(layer.times.measured is not None for layer in attachment.layers)
    sim.set_async_compute(False)


def test_a_copy_that_fails_is_an_error_of_its_layer_and_the_next_step_works(sim):
    model = Steps()
    right = expected(model)
    with swapped(model):
        call(model)
        sim.fail_next_copy(3)  # the first is the input
        with pytest.raises(RuntimeError):
            call(model)
        sim.fail_next_copy(0)
        assert torch.equal(call(model), right)
        assert torch.equal(call(model), right)


# ----------------------------------------------------------------------------------- what steps cost the host
@pytest.mark.parametrize("location", ["shared", "cpu"])
def test_steps_that_follow_use_the_events_of_those_before(sim, compute_mode, location, monkeypatch):
    model = Steps(30)
    made = []

    def counting(self, **options):
        made.append(options)
        return new_event(self, **options)

    new_event = Device.new_event
    monkeypatch.setattr(Device, "new_event", counting)
    with swapped(model, location=location):
        for _ in range(12):  # as long as steps are kept
            call(model)
        made.clear()
        for _ in range(4):
            call(model)
        assert len(made) == 4 * 2, "the begin and the end of each step, and nothing for a layer"


@pytest.mark.parametrize("location", ["shared", "cpu"])
def test_events_are_not_recorded_again_while_somebody_may_ask_for_them(sim, compute_mode, location):
    model = Steps()
    right = expected(model)
    with swapped(model, location=location) as attachment:
        for _ in range(4):
            call(model)
        sim.synchronize()
        held = [*attachment.state.streamer._retired]  # as a page's thread holds them while it looks
        times = [held[0].events.started.elapsed_time(transfer.events.ready) for transfer in held]
        for _ in range(4):
            assert torch.equal(call(model), right)
        sim.synchronize()
        assert len(held) > len(model.layers)
        assert times == [held[0].events.started.elapsed_time(transfer.events.ready) for transfer in held]
        others = [*attachment.state.streamer._retired, *attachment.state.streamer._ahead]
        assert not {id(one.events) for one in held} & {id(one.events) for one in others if one not in held}


def test_steps_are_read_when_somebody_looks_at_them(sim, compute_mode, monkeypatch):
    asked = []
    elapsed_time = sim.Event.elapsed_time
    monkeypatch.setattr(
        sim.Event, "elapsed_time", lambda first, then: asked.append(1) or elapsed_time(first, then)
    )
    model = Steps(12)
    with swapped(model) as attachment:
        timeline = attachment.state.streamer.timeline
        for _ in range(4):
            call(model)
        assert [step.h2d_bytes for step in timeline.finished] == [attachment.payload_bytes] * 3
        asked.clear()
        for _ in range(3):
            call(model)
        assert not asked
        last = timeline.finished[-1]
        assert last.h2d_bytes == attachment.payload_bytes
        assert last.copy_s > 0
        assert [span.name for span in last.spans()] == [layer.name for layer in attachment.layers]
        assert asked
        asked.clear()
        assert timeline.finished[-1] is last
        assert not asked, "once read is enough"


def test_steps_that_nobody_looked_at_hold_no_device_memory(sim):
    model = Steps(12)
    before = sim.memory_allocated()
    with swapped(model) as attachment:
        for _ in range(6):
            call(model)
        attachment.rebalance(1 << 30)
        call(model)  # Its residents are copied in this step, which is not measured.
        attachment.rebalance(0)
        beside = attachment.state.shared_bytes + attachment.fixed_bytes
        gc.collect()
        assert sim.memory_allocated() - before == beside


@pytest.mark.parametrize("location", ["shared", "cpu"])
def test_steps_leave_python_s_garbage_collector_nothing_to_do(sim, location, monkeypatch):
    # Copies of so few bytes take now this long and now that: no reason to look for another plan here.
    monkeypatch.setattr(adaptation, "CHANGED_LINK", math.inf)
    model = Steps(40)
    x = X.to(GPU)
    with swapped(model, location=location, rings=8), torch.inference_mode():
        for _ in range(12):
            model(x)
        gc.collect()
        before = gc.get_threshold()
        done = gc.get_stats()[0]["collections"]
        gc.set_threshold(10 * len(model.layers))  # One object kept for each use would soon be as many.
        try:
            for _ in range(50):
                model(x)
            assert gc.get_stats()[0]["collections"] == done
        finally:
            gc.set_threshold(*before)


# ------------------------------------------------------------------------------------------- overlap, times
class Timed(torch.nn.Module):
    """Layers that keep the device busy for a set time each, instead of computing."""

    def __init__(self, sim, count, layer_s):
        super().__init__()
        self.sim, self.layer_s = sim, layer_s
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(1024, 1024, bias=False, dtype=torch.float16).requires_grad_(False)
            for _ in range(count)
        )
        for layer in self.layers:
            layer.forward = lambda x: (sim.busy(layer_s), x)[1]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


LAYER_BYTES = 1024 * 1024 * 2


def steady_steps(model, attachment, count):
    """The last of `count` steps, without the two that know neither the order nor the times yet."""
    x = torch.ones(1, dtype=torch.float16, device=GPU)  # as the weights: no cast
    for _ in range(count):
        model(x)
    torch.simgpu.synchronize()
    timeline = attachment.state.streamer.timeline
    timeline.collect()
    return timeline.finished[2:]


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize("location", ["shared", "cpu"])
@pytest.mark.parametrize(("layer_s", "h2d"), [(0.02, 160e6), (0.008, 125e6)])
def test_a_step_takes_no_longer_than_the_longer_of_compute_and_transfers(
    sim, compute_mode, location, layer_s, h2d
):
    count = 16
    sim.set_bandwidth(h2d=h2d)
    model = Timed(sim, count, layer_s)
    budget = (count // 4 + 4) * LAYER_BYTES
    options = {"budget_bytes": budget, "ring_bytes": 4 * LAYER_BYTES}
    with attached(model, device=GPU, location=location, **options) as attachment, torch.inference_mode():
        steps = steady_steps(model, attachment, 8)
        moved = sum(layer.payload_bytes for layer in attachment.layers if layer.resident is None)
        bound = max(count * layer_s, moved / h2d)
        assert moved == (count - count // 4) * LAYER_BYTES
        assert [step.h2d_bytes for step in steps] == [moved] * len(steps)
        ratios = [step.seconds / bound for step in steps]
        assert max(ratios) <= 1.02, ratios
        assert min(ratios) > 0.98, ratios


@pytest.mark.usefixtures("virtual_time")
def test_stalls_are_what_the_bandwidth_dictates(sim, compute_mode):
    count, layer_s, h2d = 8, 0.002, 200e6
    sim.set_bandwidth(h2d=h2d)
    model = Timed(sim, count, layer_s)
    ring = 2 * LAYER_BYTES
    with (
        attached(model, device=GPU, location="shared", budget_bytes=ring, ring_bytes=ring) as attachment,
        torch.inference_mode(),
    ):
        steps = steady_steps(model, attachment, 6)
        copying = count * LAYER_BYTES / h2d
        for step in steps:
            assert step.seconds == pytest.approx(copying, rel=1e-3)
            assert step.stall_s == pytest.approx(copying - count * layer_s, rel=1e-3)
            assert step.copy_s == pytest.approx(copying, rel=1e-3)
            assert step.stall_s == pytest.approx(
                sum(served - begun for _, begun, served, *_ in step.spans()), rel=1e-6
            )
        layer = attachment.layers[3]
        assert layer.times.uses == 6
        assert layer.times.stall_s > 0


@pytest.mark.usefixtures("virtual_time")
def test_a_copy_hidden_by_compute_is_no_stall(sim, compute_mode):
    sim.set_bandwidth(h2d=2e9)
    model = Timed(sim, 6, 0.01)
    ring = 3 * LAYER_BYTES
    with (
        attached(model, device=GPU, location="shared", budget_bytes=ring, ring_bytes=ring) as attachment,
        torch.inference_mode(),
    ):
        for step in steady_steps(model, attachment, 6):
            assert step.stall_s == pytest.approx(0, abs=1e-6)
            assert step.seconds == pytest.approx(6 * 0.01, rel=1e-3)

"""One thread at a time runs a step on a device, or changes what is on it."""

from __future__ import annotations

import threading

import pytest
import swap_models as sm
import torch

from lib_qswap.swap import turn
from lib_qswap.swap.manager import attached
from lib_qswap.swap.turn import Turn

LATE_S = 20.0  # what comes after that did not come
SOON_S = 0.2  # what has not come by then waits


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def waiting_for(shared):
    """A thread that waits for its turn, and the event that says that it has had it."""
    had = threading.Event()

    def have_it():
        with shared.held():
            had.set()

    return in_thread(have_it), had


def test_a_block_waits_for_another_threads_block():
    shared = Turn()
    with shared.held(), shared.held():
        thread, had = waiting_for(shared)
        assert not had.wait(SOON_S)
        with shared.held():
            pass
        assert not had.wait(SOON_S)
    assert had.wait(LATE_S)
    thread.join(LATE_S)
    assert shared.is_mine_or_free


@pytest.mark.parametrize("first", ["the step", "the block"])
def test_a_step_with_a_block_in_it_lasts_until_both_are_over(first):
    shared = Turn()
    block = shared.held()
    shared.begin_step("a model")
    block.__enter__()
    shared.begin_step("a model")  # again, of a forward that is done anew
    _thread, had = waiting_for(shared)
    ends = [lambda: shared.end_step("a model"), lambda: block.__exit__(None, None, None)]
    if first == "the block":
        ends.reverse()
    ends[0]()
    assert not had.wait(SOON_S)
    ends[1]()
    assert had.wait(LATE_S)


def test_a_step_within_a_step_ends_alone():
    shared = Turn()
    shared.begin_step("a model")
    shared.begin_step("another in it")
    shared.end_step("another in it")
    _thread, had = waiting_for(shared)
    assert not had.wait(SOON_S)
    shared.end_step("a model")
    assert had.wait(LATE_S)


def test_a_step_that_is_over_ends_those_in_it_that_never_ended():
    shared = Turn()
    shared.begin_step("a model")
    shared.begin_step("another in it")
    shared.end_step("a model")
    _thread, had = waiting_for(shared)
    assert had.wait(LATE_S)


def test_a_step_waits_for_another_threads_block_and_nobody_else_can_end_it():
    shared = Turn()
    begun, may_end = threading.Event(), threading.Event()

    def step():
        shared.begin_step("a model")
        begun.set()
        may_end.wait(LATE_S)
        shared.end_step("a model")

    with shared.held():
        thread = in_thread(step)
        assert not begun.wait(SOON_S)
    assert begun.wait(LATE_S)
    assert not shared.is_mine_or_free
    shared.end_step("a model")
    assert not shared.is_mine_or_free
    may_end.set()
    thread.join(LATE_S)
    assert shared.is_mine_or_free


def test_a_thread_that_died_in_its_step_is_not_waited_for():
    shared = Turn()
    in_thread(lambda: shared.begin_step("a model")).join(LATE_S)
    thread, had = waiting_for(shared)
    assert had.wait(LATE_S)
    thread.join(LATE_S)


def test_a_step_that_was_never_ended_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(turn, "LONGEST_WAIT_S", 0.1)
    monkeypatch.setattr(turn, "LOOK_S", 0.05)
    shared = Turn()
    shared.begin_step("a model")
    thread, had = waiting_for(shared)
    assert had.wait(LATE_S)
    thread.join(LATE_S)
    with shared.held():  # It was taken away; this thread has to wait for its turn like any other.
        pass
    assert shared.is_mine_or_free


GPU = "simgpu"


class Chain(torch.nn.Module):
    """Layers, and something that is done in their midst."""

    def __init__(self, count=6):
        super().__init__()
        weights = [sm.packed_weight("Q8_0", (256, 256), i) for i in range(count)]
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(256, 256, bias=False, device="meta") for _ in weights
        )
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.midway = lambda: None

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            if i == len(self.layers) // 2:
                self.midway()
            x = torch.tanh(layer(x) * 0.05) + x
        return x


def call(model):
    x = torch.linspace(-1, 1, 512).view(2, 256).to(GPU)
    with torch.inference_mode():
        return model(x).cpu()


@pytest.mark.simgpu
@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("change", ["unload", "give_up", "rest", "rebalance", "begin_step"])
def test_what_another_thread_changes_waits_for_the_end_of_the_step(sim, compute_mode, change):
    model, other = Chain(), Chain()
    options = {"device": GPU, "location": "shared", "ring_bytes": 140_000, "compute_dtype": torch.float32}
    with (
        attached(model, budget_bytes=600_000, **options) as attachment,
        attached(other, budget_bytes=10**6, **options) as second,
    ):
        assert 0 < attachment.resident_bytes < attachment.payload_bytes
        right = call(model)
        changes = {
            "unload": second.unload,
            "give_up": lambda: attachment.give_up(attachment.resident_bytes),
            "rest": second.rest,
            "rebalance": lambda: attachment.rebalance(700_000),
            "begin_step": lambda: call(other),
        }
        done = threading.Event()
        threads = []

        def begin_change():
            threads.append(in_thread(lambda: (changes[change](), done.set())))
            assert not done.wait(SOON_S)

        model.midway = begin_change
        assert torch.equal(call(model), right)
        assert done.wait(LATE_S)
        model.midway = lambda: None
        attachment.rebalance(600_000)
        assert torch.equal(call(model), right)


@pytest.mark.simgpu
@pytest.mark.usefixtures("engine")
def test_a_model_that_is_given_back_leaves_no_step_behind(sim):
    model = Chain()
    with attached(model, device=GPU, location="shared", compute_dtype=torch.float32) as attachment:
        attachment.begin_step(model)
        assert attachment.state.turn.is_mine
    assert not attachment.state.turn.is_mine


def fail(*_args):
    raise RuntimeError("stopped by the test")


def fail_in_the_midst(model):
    model.midway = fail


def fail_before(model):
    model.register_forward_pre_hook(fail)


def fail_instead(model):
    model.forward = fail  # over QSwap's own


def fail_afterwards(model):
    model.register_forward_hook(fail)


@pytest.mark.simgpu
@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("failing", [fail_in_the_midst, fail_before, fail_instead, fail_afterwards])
def test_a_forward_that_raised_leaves_the_turn_to_others(sim, failing):
    model = Chain()
    with attached(model, device=GPU, location="shared", compute_dtype=torch.float32) as attachment:
        failing(model)
        with pytest.raises(RuntimeError, match="stopped by the test"):
            call(model)
        thread, had = waiting_for(attachment.state.turn)
        assert had.wait(SOON_S * 10)
        thread.join(LATE_S)

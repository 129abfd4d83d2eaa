"""Memory beside the weights: what steps do not need is given to residents, and given back before anything
fails."""

from __future__ import annotations

import functools

import pytest
import torch
from swap_models import messages

from lib_qswap.swap.manager import attach, attached

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("engine")]

GPU = "simgpu:0"
MB = 1 << 20
COUNT = 32
LAYER_BYTES = 2048 * 2048 * 2  # 8 MB
TOTAL = 512 * MB


@functools.cache
def weights():
    generator = torch.Generator().manual_seed(3)
    first = (torch.randn(2048, 2048, generator=generator) / 45).half()
    return [first.roll(i, 0) for i in range(COUNT)]


class Hungry(torch.nn.Module):
    """Half-precision layers, and in their midst a temporary of `rows` MB."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(2048, 2048, bias=False, device="meta") for _ in range(COUNT)
        )
        for layer, weight in zip(self.layers, weights(), strict=True):
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x, rows):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == COUNT // 2:
                temporary = torch.ones(rows.shape[0] * MB, dtype=torch.uint8, device=x.device)
                x = x + temporary[:1].to(x.dtype) - 1
        return x


def run(model, rows_mb, device=GPU):
    x = torch.linspace(-1, 1, 2048, dtype=torch.float16).to(device).view(1, -1)
    with torch.inference_mode():
        return model(x, torch.empty(rows_mb, 0, device=device)).cpu()


@pytest.fixture
def hungry(sim, virtual_time):
    """The link is what limits its steps: every resident more makes them shorter."""
    sim.set_total(TOTAL)
    sim.set_bandwidth(h2d=200e6)
    return Hungry()


@pytest.fixture
def expected(hungry):
    result = run(hungry, 1, "cpu")
    assert result.isfinite().all()
    assert result.std() > 0.1
    return result


def other_program(nbytes):
    return torch.empty(nbytes, dtype=torch.uint8, device=GPU)


def test_what_steps_do_not_need_is_given_to_residents(sim, hungry, expected, compute_mode):
    base, spare = 96 * MB, 256 * MB
    with attached(hungry, device=GPU, location="shared", budget_bytes=base) as attachment:
        attachment.rebalance(base, spare_bytes=spare)
        for _ in range(5):
            assert torch.equal(run(hungry, 100), expected)
        assert attachment.grown_bytes > 64 * MB
        assert base < attachment.budget_bytes == base + attachment.grown_bytes <= base + spare
        assert attachment.resident_bytes > base
        # The tenth and the 64 MB beside the need of 100 MB are still free.
        free, _ = attachment.device.memory_bytes()
        assert free >= 170 * MB
        assert not messages()


def test_a_budget_that_was_asked_for_does_not_grow(hungry, expected):
    with attached(hungry, device=GPU, location="shared", budget_bytes=96 * MB) as attachment:
        for _ in range(5):
            assert torch.equal(run(hungry, 1), expected)
        assert attachment.budget_bytes == 96 * MB
        assert attachment.grown_bytes == 0


def test_what_was_given_is_taken_back_before_a_work_that_was_not_measured(sim, hungry, expected):
    base = 96 * MB
    with attached(hungry, device=GPU, location="shared", budget_bytes=base) as attachment:
        attachment.rebalance(base, spare_bytes=TOTAL)
        for _ in range(4):
            run(hungry, 10)
        assert attachment.grown_bytes > 100 * MB
        assert torch.equal(run(hungry, 300), expected)
        assert attachment.grown_bytes == 0
        assert attachment.budget_bytes == base
        # Measured, it is given only what it leaves.
        for _ in range(3):
            assert torch.equal(run(hungry, 300), expected)
        assert attachment.grown_bytes < 64 * MB
        # The first work is known.
        run(hungry, 10)
        assert attachment.grown_bytes > 100 * MB
        assert not messages()


def count_changes(attachment, monkeypatch):
    changes = []
    fit_into = attachment.fit_into
    monkeypatch.setattr(attachment, "fit_into", lambda nbytes: changes.append(nbytes) or fit_into(nbytes))
    return changes


def test_works_that_take_turns_in_every_step_do_not_move_residents_to_and_fro(hungry, expected, monkeypatch):
    with attached(hungry, device=GPU, location="shared", budget_bytes=96 * MB) as attachment:
        attachment.rebalance(96 * MB, spare_bytes=TOTAL)
        changes = count_changes(attachment, monkeypatch)
        for step in range(12):
            if step == 4:
                changes.clear()
            for rows in (10, 320, 320, 320):  # tiles in batches, and the rest of them
                assert torch.equal(run(hungry, rows), expected)
        assert not changes
        # A work that lasts after all gets a plan of its own.
        for _ in range(12):
            run(hungry, 10)
        assert len(changes) == 1
        assert attachment.grown_bytes > 100 * MB


def test_works_that_take_turns_share_what_both_leave(hungry, expected):
    with attached(hungry, device=GPU, location="shared", budget_bytes=96 * MB) as attachment:
        attachment.rebalance(96 * MB, spare_bytes=TOTAL)
        for _ in range(10):
            for rows in (10, 12):  # every other step without the negative prompt
                assert torch.equal(run(hungry, rows), expected)
        assert attachment.grown_bytes > 100 * MB


def test_a_run_that_was_broken_off_is_not_taken_for_what_its_work_lasts(hungry, monkeypatch):
    with attached(hungry, device=GPU, location="shared", budget_bytes=96 * MB) as attachment:
        attachment.rebalance(96 * MB, spare_bytes=TOTAL)
        for rows, forwards in ((10, 8), (320, 8), (10, 1), (320, 8)):
            for _ in range(forwards):
                run(hungry, rows)
        changes = count_changes(attachment, monkeypatch)
        run(hungry, 10)
        assert len(changes) == 1


def test_memory_that_another_program_takes_is_given_back_by_residents(sim, hungry, expected, compute_mode):
    with attached(hungry, device=GPU, location="shared", budget_bytes=300 * MB) as attachment:
        assert attachment.resident_bytes == COUNT * LAYER_BYTES
        for _ in range(3):
            assert torch.equal(run(hungry, 100), expected)
        taken = other_program(150 * MB)
        assert torch.equal(run(hungry, 100), expected)
        assert attachment.resident_bytes < COUNT * LAYER_BYTES
        assert any("residents are given back" in text for text in messages())
        assert not any("ran out" in text for text in messages())
        del taken


class Retries:
    """The allocator's count, which is read before and after every forward: higher after those that `crowded`
    says, and by `others` before each."""

    def __init__(self, crowded, others=0):
        self.crowded, self.others, self.reads, self.count = crowded, others, 0, 0

    def __call__(self):
        self.reads += 1
        self.count += self.others if self.reads % 2 else self.crowded(self.reads // 2)
        return self.count


def residents(attachment, monkeypatch, retries, forwards):
    """Resident megabytes after each of so many forwards."""
    monkeypatch.setattr(attachment.device, "allocation_retries", retries)
    found = []
    for _ in range(forwards):
        run(attachment.roots[0](), 20)
        found.append(attachment.resident_bytes // MB)
    return found


ALL = COUNT * LAYER_BYTES // MB


def test_residents_give_way_where_the_allocator_tries_again_in_every_forward(hungry, expected, monkeypatch):
    with attached(hungry, device=GPU, location="shared", budget_bytes=300 * MB) as attachment:
        retries = Retries(lambda nth: attachment.resident_bytes > 100 * MB)
        found = residents(attachment, monkeypatch, retries, 6)
        assert found[:2] == [ALL, ALL], "one forward may be so by itself"
        assert 100 < found[2] <= ALL - 128
        # At once now, and no more than it takes.
        assert 0 <= found[3] <= 100
        assert found[3:] == found[3:4] * 3
        assert any("steps wait for device memory" in text for text in messages())
        assert torch.equal(run(hungry, 20), expected)


def test_single_retries_and_those_of_others_are_left_alone(hungry, monkeypatch):
    with attached(hungry, device=GPU, location="shared", budget_bytes=300 * MB) as attachment:
        assert residents(attachment, monkeypatch, Retries(lambda nth: nth % 2), 6) == [ALL] * 6
        assert residents(attachment, monkeypatch, Retries(lambda nth: 0, others=3), 4) == [ALL] * 4
        assert not messages()


def test_a_forward_without_retries_makes_two_with_them_necessary_again(hungry, monkeypatch):
    with attached(hungry, device=GPU, location="shared", budget_bytes=300 * MB) as attachment:
        crowded = [1, 1, 0, 1, 0, 1, 1, 0]
        found = residents(attachment, monkeypatch, Retries(lambda nth: crowded[nth - 1]), 8)
        assert found[1] == ALL > found[2] == found[6] > found[7]


def test_nothing_is_given_back_for_the_last_step_of_a_run(hungry, monkeypatch):
    with attached(hungry, device=GPU, location="shared", budget_bytes=300 * MB) as attachment:
        attachment.run.begin(3)
        assert residents(attachment, monkeypatch, Retries(lambda nth: 1), 3) == [ALL] * 3


def test_what_was_given_back_for_the_allocator_is_not_lent_again(hungry, monkeypatch):
    base = 96 * MB
    with attached(hungry, device=GPU, location="shared", budget_bytes=base) as attachment:
        attachment.rebalance(base, spare_bytes=256 * MB)
        for _ in range(4):
            run(hungry, 20)
        grown = attachment.grown_bytes
        assert grown > 128 * MB
        residents(attachment, monkeypatch, Retries(lambda nth: nth < 3), 3)
        assert attachment.grown_bytes <= grown - 128 * MB
        assert attachment.crowded_bytes >= 128 * MB
        # Works in turns, each with a plan of its own.
        for rows in (30, 20, 30, 20, 30, 30):
            run(hungry, rows)
            assert attachment.grown_bytes <= 256 * MB - attachment.crowded_bytes


def test_residents_stay_where_something_else_once_took_more_than_a_step_needs(sim, hungry, expected):
    other_program(500 * MB)  # and gives it back at once; the device's peak remembers it
    with attached(hungry, device=GPU, location="shared", budget_bytes=300 * MB) as attachment:
        for _ in range(4):
            assert torch.equal(run(hungry, 20), expected)
        assert attachment.resident_bytes == COUNT * LAYER_BYTES
        assert not messages()


def test_a_forward_that_runs_out_of_memory_is_done_again_with_fewer_residents(
    sim, hungry, expected, compute_mode
):
    with attached(hungry, device=GPU, location="shared", budget_bytes=300 * MB) as attachment:
        assert attachment.resident_bytes == COUNT * LAYER_BYTES
        assert torch.equal(run(hungry, 400), expected)
        assert attachment.resident_bytes < 100 * MB
        assert "the computation ran out of device memory and is done again" in " ".join(messages())
        for _ in range(4):
            assert torch.equal(run(hungry, 400), expected)
        assert attachment.state.streamer.idle()


def test_a_forward_that_is_done_again_has_the_arguments_of_the_first_time(sim, hungry, expected):
    """Forge's UNet takes a ControlNet's residuals out of their lists as it uses them."""
    layers = hungry.layers

    class Controlled(Hungry):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.layers = layers

        def forward(self, x, rows, control):
            for residuals in control["output"]:
                x = x + residuals.pop()
            control["output"].clear()
            used.append(control.pop("name"))
            return super().forward(x, rows)

    def call(model, rows_mb, device):
        x = torch.linspace(-1, 1, 2048, dtype=torch.float16, device="cpu").to(device).view(1, -1)
        control = {"name": "tile", "output": [[x * 3, x * 2], [x]]}
        with torch.inference_mode():
            return model(x, torch.empty(rows_mb, 0, device=device), control=control).cpu()

    used: list[str] = []
    model = Controlled()
    right = call(model, 1, "cpu")
    with attached(model, device=GPU, location="shared", budget_bytes=300 * MB):
        assert torch.equal(call(model, 400, GPU), right)
    assert used == ["tile"] * 3


class _Cache:
    """Of keys and values, as transformers has one: a forward adds to it."""

    def __init__(self):
        self.tokens = 0


@pytest.mark.parametrize("kept_in", ["argument", "buffer"])
def test_a_forward_with_a_state_of_its_own_is_not_done_again(kept_in, sim, hungry):
    layers = hungry.layers

    class Counting(Hungry):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.layers = layers
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x, rows, cache):
            if cache is None:
                self.count += 1
            else:
                cache.tokens += 1
            return super().forward(x, rows)

    model, cache = Counting(), _Cache() if kept_in == "argument" else None
    x = torch.linspace(-1, 1, 2048, dtype=torch.float16, device="cpu").to(GPU).view(1, -1)
    with attached(model, device=GPU, location="shared", budget_bytes=300 * MB) as attachment:
        with torch.inference_mode(), pytest.raises(torch.cuda.OutOfMemoryError):
            model(x, torch.empty(400, 0, device=GPU), cache)
        assert attachment.resident_bytes == COUNT * LAYER_BYTES
    assert (model.count.item() if cache is None else cache.tokens) == 1


def test_what_was_given_on_top_stays_on_top_where_it_cannot_be_had(sim, hungry, expected, monkeypatch):
    attachment = attach(hungry, device=GPU, location="shared", budget_bytes=120 * MB)
    attachment.rebalance(120 * MB, spare_bytes=400 * MB)
    fit_into = type(attachment).fit_into

    def fit_with_a_failure(self, budget_bytes):
        sim.fail_next_device(1)
        fit_into(self, budget_bytes)
        sim.fail_next_device(0)

    monkeypatch.setattr(type(attachment), "fit_into", fit_with_a_failure)
    for _ in range(6):
        assert torch.equal(run(hungry, 20), expected)
    assert any("no room" in text for text in messages())
    assert attachment.budget_bytes > 120 * MB
    assert attachment.asked_bytes <= 120 * MB
    attachment.detach()


def test_measured_steps_that_were_broken_off_are_measured_again(sim, hungry, expected):
    with attached(hungry, device=GPU, location="shared", budget_bytes=120 * MB) as attachment:
        layers = hungry.layers
        own = layers[COUNT // 2].forward
        layers[COUNT // 2].forward = None
        for _ in range(2):
            with pytest.raises(TypeError):
                run(hungry, 20)
        layers[COUNT // 2].forward = own
        for _ in range(4):
            assert torch.equal(run(hungry, 20), expected)
        assert all(layer.times.measured is not None for layer in attachment.layers)


def test_what_was_given_back_too_much_is_taken_again_once_the_step_was_measured(sim, hungry, expected):
    with attached(hungry, device=GPU, location="shared", budget_bytes=300 * MB) as attachment:
        assert torch.equal(run(hungry, 300), expected)
        given_back = attachment.resident_bytes
        assert given_back < COUNT * LAYER_BYTES
        for _ in range(4):
            assert torch.equal(run(hungry, 300), expected)
        assert given_back < attachment.resident_bytes < COUNT * LAYER_BYTES
        assert attachment.budget_bytes <= 300 * MB
        assert sum("ran out" in text for text in messages()) == 1


def test_other_models_residents_go_where_a_model_has_none_left(sim, hungry, expected):
    other = Hungry()
    with (
        attached(other, device=GPU, location="shared", budget_bytes=300 * MB) as rich,
        attached(hungry, device=GPU, location="shared", budget_bytes=0) as poor,
    ):
        assert rich.resident_bytes
        assert not poor.resident_bytes
        assert torch.equal(run(hungry, 400), expected)
        assert not rich.resident_bytes
        assert torch.equal(run(other, 100), run(Hungry(), 1, "cpu"))


def test_where_there_is_nothing_to_give_the_error_is_the_devices_own(sim, hungry):
    with attached(hungry, device=GPU, location="shared", budget_bytes=300 * MB) as attachment:
        with pytest.raises(torch.OutOfMemoryError):
            run(hungry, 600)
        assert not attachment.resident_bytes
        run(hungry, 100)


def test_the_models_own_forward_is_back_afterwards(hungry):
    calls = []
    own = hungry.forward
    hungry.forward = lambda *args: calls.append(1) or own(*args)
    mine = hungry.__dict__["forward"]
    attachment = attach(hungry, device=GPU, location="shared", budget_bytes=96 * MB)
    run(hungry, 1)
    assert calls == [1]
    attachment.detach()
    assert hungry.__dict__["forward"] is mine
    del hungry.forward
    attachment = attach(hungry, device=GPU, location="shared", budget_bytes=96 * MB)
    hungry.forward = mine  # another extension, later
    attachment.detach()
    assert hungry.__dict__["forward"] is mine

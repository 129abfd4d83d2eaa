"""Steps that ask for the same conditioning again run without the layers that depend on nothing else, and with
the same bits."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import sys
import weakref
from pathlib import Path

import pytest
import torch
from modulated_network import (
    DEPENDENT,
    INDEPENDENT,
    OF_NETWORK,
    TIMES,
    WIDTH,
    Network,
    Setup,
    equal,
    makers,
)

from lib_qswap.quant import kernels
from lib_qswap.standalone.budget import Budget
from lib_qswap.standalone.demo_file import demo_file, make_demo_file
from lib_qswap.standalone.host import CONDITIONING, Settings, StandaloneHost
from lib_qswap.swap import ledger, look_ahead
from lib_qswap.swap.conditioning import FLUX, SD3
from lib_qswap.swap.kept_outputs import KEPT_FOR_STEPS, MOST_IN_A_ROW, SHARE_OF_WEIGHTS, KeptOutputs

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
SWAPPING = Settings(location="shared", budget=Budget(nbytes=0), steps=4, pixels=64)


@pytest.fixture(params=["cpu", pytest.param("simgpu", marks=pytest.mark.simgpu)])
def setup(request):
    if request.param == "simgpu":
        request.getfixturevalue("sim")
    yield from makers(Setup, request.param)


# -------------------------------------------------------------------------------------- the steps
def test_a_second_image_of_the_same_prompt_has_the_same_bits_without_those_layers(setup):
    model = setup()
    first, again = model.image(), []
    used = [model.fetched(lambda t=t: again.append(model.step(t))) for t in TIMES * 2]
    # Whether the prompt has come back is known from the second step on.
    assert used == [DEPENDENT | INDEPENDENT] + 7 * [INDEPENDENT]
    assert equal(again, first + first)
    again = again[:4]
    model.attachment.configure(
        location="shared", pin_budget_bytes=None, ring_bytes=None, arithmetic="exact", keeps_outputs=False
    )
    model.attachment.rebalance(0)
    assert model.fetched(lambda: again.extend(model.image())) == DEPENDENT | INDEPENDENT
    assert equal(again, first + first)


def test_other_inputs_of_the_network_do_not_matter(setup):
    model = setup()
    model.image()
    model.image()
    model.x = model.x + 1
    with_context = []
    used = model.fetched(lambda: with_context.extend(model.image(context=None)))
    assert used == INDEPENDENT
    model.attachment.idle.kept.clear()
    assert equal(with_context, model.image())


@pytest.mark.parametrize("what", ["time", "text", "batch", "dtype", "unknown argument"])
def test_another_conditioning_is_computed(setup, what):
    model = setup()
    model.image()
    model.image()  # served
    other = {
        "time": lambda model: model.image((0.9, 0.6)),
        "text": lambda model: model.image(pooled=model.pooled + 1),
        "batch": lambda model: model.image(pooled=model.pooled.expand(2, -1)),
        "dtype": lambda model: model.image(pooled=model.pooled.double()),
        "unknown argument": lambda model: model.image(strength=0.5),
    }[what]
    computed = []
    assert model.fetched(lambda: computed.extend(other(model))) == DEPENDENT | INDEPENDENT
    fresh = setup()
    fresh.attachment.idle.allowed = False
    assert equal(computed, other(fresh))


def test_what_the_host_adds_to_a_weight_is_part_of_the_key(setup):
    model = setup()
    added = {}
    model.attachment.idle.added = added.get
    module = next(iter(model.attachment.idle.kept.layers)).module()
    model.image()
    assert model.fetched(lambda: model.image()) == DEPENDENT | INDEPENDENT  # its first step
    assert model.fetched(lambda: model.image()) == INDEPENDENT
    for strength in (0.5, 0.7):
        added[module] = ("a LoRA", strength)  # in place: nobody is told
        assert model.fetched(lambda: model.image()) == DEPENDENT | INDEPENDENT
    model.image()
    assert model.fetched(lambda: model.image()) == INDEPENDENT


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_without_memory_for_what_would_be_kept_the_step_is_none_the_worse(setup, monkeypatch, error):
    model = setup()
    expected = model.image()
    model.attachment.idle.kept.clear()

    def fails(*_args):
        raise error("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(model.attachment.idle.kept, "_store", fails)
    assert equal(model.image(), expected)
    assert equal(model.image(), expected)


def test_prompts_that_take_turns_are_both_served(setup):
    model = setup()
    other = model.pooled * 2

    def both():
        return [model.step(t, p) for t in TIMES for p in (model.pooled, other)]

    first, again = both(), both()
    used = model.fetched(lambda: again.extend(both()))
    assert used == INDEPENDENT
    assert equal(again, first + first)


def test_a_sampler_that_comes_to_each_time_twice_makes_no_other_plan(setup):
    model = setup()
    computed = DEPENDENT | INDEPENDENT
    evaluated = [1.0, *(t for t in (0.75, 0.5, 0.25) for _ in range(2))]
    used = [model.fetched(lambda t=t: model.step(t)) for t in evaluated * 2]
    assert used == 7 * [computed] + 7 * [INDEPENDENT]


def test_a_model_that_is_resident_whole_keeps_nothing_and_reads_nothing(setup):
    model = setup(budget_bytes=1 << 40)
    first = model.image()
    assert model.fetched(lambda: first.extend(model.image())) == DEPENDENT | INDEPENDENT
    assert model.attachment.idle.kept.nbytes == 0
    assert equal(first[:4], first[4:])


def test_with_room_for_all_layers_none_is_idle(setup):
    model = setup()
    first = model.image()
    model.image()
    model.attachment.rebalance(model.attachment.whole_bytes)
    assert all(layer.resident is not None for layer in model.attachment.layers)
    assert model.fetched(lambda: first.extend(model.image())) == DEPENDENT | INDEPENDENT
    assert equal(first[:4], first[4:])


def test_where_some_layers_are_resident_others_take_their_place(setup):
    probe = setup()
    attachment = probe.attachment
    largest = max(layer.payload_bytes for layer in attachment.layers)
    budget = attachment.floor_bytes + 4 * largest
    probe.attachment.detach()
    model = setup(budget_bytes=budget)
    first = model.image()
    before = {layer.name for layer in model.attachment.layers if layer.resident is not None}
    assert before & DEPENDENT, "the case is made so that some of them are resident at first"
    assert equal(model.image(), first)
    model.attachment.rebalance(budget)
    after = {layer.name for layer in model.attachment.layers if layer.resident is not None}
    assert after
    assert not after & DEPENDENT
    assert equal(model.image(), first)
    assert equal(model.image((0.9, 0.3)), setup(budget_bytes=budget).image((0.9, 0.3)))


# --------------------------------------------------------------------------- when what is kept goes
def test_weights_that_the_host_changes_make_new_outputs(setup):
    model = setup()
    first = model.image()
    with model.attachment.masters_bound():
        for name in ("time_in", "blocks.1.modulation.1"):
            module = model.network.get_submodule(name)
            module.weight = torch.nn.Parameter(module.weight.detach() * 1.5, requires_grad=False)
    model.attachment.rebalance(0)
    changed = model.image()
    assert not any(map(torch.equal, changed, first))
    model.step(1.0)
    assert model.fetched(model.image) == INDEPENDENT


def test_another_kernel_makes_new_outputs(setup, monkeypatch):
    model = setup()
    model.image()
    model.image()
    monkeypatch.setattr(kernels, "in_use", lambda device: "another")
    for time in TIMES:
        assert model.fetched(lambda t=time: model.step(t)) == DEPENDENT | INDEPENDENT
    model.step(1.0)
    assert model.fetched(model.image) == INDEPENDENT


def test_a_step_that_raises_keeps_nothing(setup, monkeypatch):
    model = setup()
    model.step(0.5)
    model.step(0.25)
    last = model.network.blocks[-1]
    monkeypatch.setattr(last, "forward", lambda x, vector: (_ for _ in ()).throw(ValueError("on purpose")))
    with pytest.raises(ValueError, match="on purpose"):
        model.step(0.125)
    monkeypatch.undo()
    assert model.fetched(lambda: model.step(0.125)) == DEPENDENT | INDEPENDENT
    assert model.fetched(lambda: model.step(0.25)) == DEPENDENT | INDEPENDENT
    assert model.fetched(lambda: model.step(0.125)) == INDEPENDENT


def test_a_step_in_which_a_layer_was_left_out_is_not_kept(setup):
    model = setup()
    first = model.image()
    model.attachment.idle.kept.clear()
    blocks = model.network.blocks
    model.network.blocks = blocks[:-1]
    model.image()
    model.network.blocks = blocks
    again = []
    assert model.fetched(lambda: again.extend(model.image())) == DEPENDENT | INDEPENDENT
    assert equal(again, first)


def test_who_gets_an_output_may_write_into_it(setup):
    model = setup()
    first = model.image()
    model.attachment.idle.kept.clear()
    for block in model.network.blocks:
        block.modulation.register_forward_hook(lambda _module, _args, output: output.add_(1).sub_(1).mul_(2))
    doubled = [model.image(), model.image(), model.image()]
    assert not equal(doubled[0], first)
    assert equal(doubled[1], doubled[0])
    assert equal(doubled[2], doubled[0])


class Twice(Network):
    """Runs its blocks for a prompt and against it."""

    def forward(self, x, time, pooled, context=None, **more):
        return super().forward(x, time, pooled) - super().forward(x, time, -pooled)


def test_a_layer_that_a_step_calls_twice_is_computed(setup):
    model = setup()
    model.network.__class__ = Twice
    images = [model.image() for _ in range(3)]
    assert model.attachment.idle.kept.nbytes == 0
    assert equal(images[1], images[0])
    assert equal(images[2], images[0])
    model.network.__class__ = Network
    model.image()
    assert model.attachment.idle.kept.nbytes > 0


def fails_once(model, monkeypatch, at):
    """The device runs out of memory in block `at` of the next step."""
    block = model.network.blocks[at]
    own, calls = type(block).forward, []

    def forward(x, vector):
        calls.append(vector)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("on purpose")
        return own(block, x, vector)

    monkeypatch.setattr(block, "forward", forward)
    return calls


@pytest.mark.parametrize("kind", ["computed", "served"])
def test_a_step_that_is_done_again_has_the_same_outputs(setup, monkeypatch, kind):
    probe = setup().attachment
    largest = max(layer.payload_bytes for layer in probe.layers)
    model = setup(budget_bytes=probe.floor_bytes + 3 * largest, ring_bytes=largest)
    for block in model.network.blocks:
        block.modulation.register_forward_hook(lambda _module, _args, output: output.mul_(2))
    first = model.image()
    if kind == "served":
        model.image()
    else:
        model.attachment.idle.kept.clear()
    calls = fails_once(model, monkeypatch, 2)
    again = [model.step(TIMES[0])]
    assert len(calls) == 2
    assert again[0].equal(first[0])
    assert equal(model.image(), first)
    assert equal(model.image(), first)


def test_without_memory_for_what_is_kept_the_layers_run(setup, monkeypatch):
    model = setup()
    first = model.image()
    model.image()
    kept = model.attachment.idle.kept
    monkeypatch.setattr(kept, "_serve", lambda: False)
    again = []
    assert model.fetched(lambda: again.extend(model.image())) == DEPENDENT | INDEPENDENT
    assert equal(again, first)
    assert model.attachment.state.streamer.overflows == 0
    kept.clear()
    monkeypatch.setattr(kept, "_store", lambda key, outputs: (_ for _ in ()).throw(MemoryError))
    assert equal(model.image(), first)


def test_arithmetic_and_the_users_choice_drop_what_is_kept(setup):
    for change in ({"arithmetic": "like Forge"}, {"keeps_outputs": False}):
        model = setup()
        model.image()
        model.image()
        settings = {"location": "shared", "pin_budget_bytes": None, "ring_bytes": None, "arithmetic": "exact"}
        model.attachment.configure(**(settings | change))
        assert model.attachment.idle.kept.nbytes == 0
        assert model.attachment.budget_bytes is None
        model.attachment.rebalance(0)
        entry = ledger.model_snapshot(model.attachment)["bytes"]
        assert entry["spared_per_step"] == entry["kept_outputs"] == 0
        assert model.fetched(lambda model=model: model.step(1.0)) == DEPENDENT | INDEPENDENT


def test_unloading_between_images_changes_nothing(setup):
    model = setup()
    first = model.image()
    model.image()
    model.attachment.unload()
    assert ledger.model_snapshot(model.attachment)["bytes"]["spared_per_step"] == 0
    model.attachment.rebalance(0)
    assert equal(model.image(), first)
    assert equal(model.image((0.9, 0.3)), setup().image((0.9, 0.3)))


def test_what_a_broken_off_step_was_to_be_served_is_not_given_outside_of_one(setup):
    model = setup()
    model.image()
    model.image()

    def refuse(*_args):
        raise ValueError("on purpose")

    hook = model.network.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match="on purpose"):
        model.step(1.0)
    hook.remove()
    model.attachment.rest()
    model.attachment.wake()
    x = torch.randn(1, WIDTH).to(model.device)
    with torch.no_grad():
        ours = model.network.time_in(x)
    model.attachment.detach()
    assert torch.equal(ours.cpu(), torch.nn.functional.linear(x.cpu(), *model.network.time_in.parameters()))


def test_a_model_with_kept_outputs_goes_when_nobody_holds_it(setup):
    model = setup()
    model.image()
    model.image()
    gone = weakref.ref(model.network)
    gc.disable()
    try:
        del model.network
        assert gone() is None
    finally:
        gc.enable()


def test_detaching_gives_the_forwards_back_and_the_memory(setup):
    model = setup()
    model.image()
    kept = model.attachment.idle.kept
    assert kept.nbytes > 0
    assert "forward" in model.network.time_in.__dict__
    model.attachment.detach()
    assert kept.nbytes == 0
    assert not any("forward" in module.__dict__ for module in model.network.modules())


def test_the_report_says_what_is_spared(setup):
    model = setup()
    model.image()
    entry = ledger.model_snapshot(model.attachment)
    assert entry["bytes"]["spared_per_step"] == 0 < entry["bytes"]["kept_outputs"]
    swapped = entry["bytes"]["swapped_per_step"]
    model.image()
    entry = ledger.model_snapshot(model.attachment)
    sizes = {layer["name"]: layer["bytes"] for layer in entry["layers"]}
    assert swapped - entry["bytes"]["swapped_per_step"] == entry["bytes"]["spared_per_step"]
    assert entry["bytes"]["swapped_per_step"] <= sum(sizes[name] for name in INDEPENDENT)
    model.step(0.1)
    entry = ledger.model_snapshot(model.attachment)
    assert entry["bytes"]["spared_per_step"] == 0


# -------------------------------------------------------------------------------- how much is kept
def kept_of(setup) -> tuple[KeptOutputs, list]:
    kept = setup().attachment.idle.kept
    return kept, sorted(kept.layers, key=lambda layer: layer.name)


def compute(kept, layers, key) -> bool:
    """A step; returns whether it is served."""
    served = kept.begin(key)
    if not served:
        for layer in layers:
            kept.keep(layer, torch.zeros(1, 512, device=kept._device))
    kept.end()
    return served


def test_what_is_kept_stays_within_its_share_and_does_not_thrash(setup):
    kept, layers = kept_of(setup)
    limit = sum(layer.payload_bytes for layer in layers) // SHARE_OF_WEIGHTS
    cycle = range(3 * limit // (len(layers) * 2048))
    for _ in range(3):
        for key in cycle:
            compute(kept, layers, key)
            assert kept.nbytes <= limit
    served = [key for key in cycle if key in kept._kept]
    # Dropping the oldest for the newest would have served none of a cycle longer than the room.
    assert len(served) == limit // (len(layers) * 2048)


def test_what_nobody_asks_for_any_more_gives_way(setup):
    kept, layers = kept_of(setup)
    room = sum(layer.payload_bytes for layer in layers) // SHARE_OF_WEIGHTS // (len(layers) * 2048)
    for key in range(room):
        compute(kept, layers, ("old", key))
    for _ in range(4):
        for key in range(room):
            compute(kept, layers, ("new", key))
    assert all(("new", key) in kept._kept for key in range(room))
    assert not any(("old", key) in kept._kept for key in range(room))


def test_what_was_asked_for_long_ago_goes_although_there_is_room(setup):
    kept, layers = kept_of(setup)
    compute(kept, layers, "once")
    for _ in range(KEPT_FOR_STEPS):
        compute(kept, layers, "again")
    assert "once" in kept._kept
    compute(kept, layers, "other")
    assert "once" not in kept._kept
    assert "again" in kept._kept
    assert kept.nbytes == 2 * len(layers) * 2048


def test_a_step_that_is_larger_than_all_room_drops_nothing(setup):
    kept, layers = kept_of(setup)
    compute(kept, layers, "small")
    kept.begin("huge")
    for layer in layers:
        kept.keep(layer, torch.zeros(1, 1 << 20, device=kept._device))
    kept.end()
    assert "small" in kept._kept
    assert "huge" not in kept._kept


@pytest.mark.parametrize("period", [2, 3, 4])
def test_steps_of_which_some_are_new_are_soon_served_no_more(setup, period):
    kept, layers = kept_of(setup)
    served = []
    for step in range(400):
        known = step % period and step >= period
        served.append(compute(kept, layers, step % period if known else ("new", step)))
    changes = sum(one != then for one, then in itertools.pairwise(served))
    assert changes <= 4 * math.log2(MOST_IN_A_ROW)
    kept.clear()
    for _ in range(3 * MOST_IN_A_ROW):
        last = compute(kept, layers, "the same")
    assert last


# ------------------------------------------------------------------------------------ the key of it
def test_a_network_with_another_forward_is_not_known():
    class Changed(Network):
        def forward(self, x, time, pooled, mask=None):
            return super().forward(x, time, pooled)

    assert OF_NETWORK.fits(Network())
    assert not OF_NETWORK.fits(Changed())
    assert not FLUX.fits(Network())


def test_the_key_is_of_values_dtypes_and_shapes():
    network, x = Network(), torch.zeros(1, 2, WIDTH)

    @torch.no_grad()
    def key(time, pooled, x=x, **more):
        return OF_NETWORK.key(network, (x, time), {"pooled": pooled, **more}, x.device)

    time, pooled = torch.tensor([0.5]), torch.ones(1, WIDTH)
    assert key(time, pooled) == key(time.clone(), pooled.clone(), x + 1)
    assert key(time, pooled) != key(time + 1e-7, pooled)
    assert key(time, pooled) != key(time, pooled.half())
    assert key(time, pooled) != key(time, pooled, x.half())
    assert key(time, pooled) != key(time, pooled.reshape(2, -1))
    assert key(torch.tensor([0.0]), pooled) != key(torch.tensor([-0.0]), pooled)
    assert key(0.5, pooled) != key(time, pooled)
    assert key(0.0, pooled) != key(-0.0, pooled) != key(0, pooled)
    assert key(time, pooled.view(WIDTH).expand(1, WIDTH)) == key(time, pooled)
    assert key(time.expand(2), pooled) == key(time.repeat(2), pooled) != key(time, pooled)
    assert key(torch.tensor(0.5).expand(1), pooled) == key(time, pooled)
    assert key(time, pooled.to("meta")) is None
    assert key(time, pooled, other=1) is None
    assert key(time, "a text") is None
    assert key(torch.tensor([float("nan")]), pooled) == key(torch.tensor([float("nan")]), pooled)


def test_there_is_no_key_where_outputs_have_gradients_or_are_cast():
    network = Network()
    arguments = (network, (torch.zeros(1, 2, WIDTH), torch.ones(1)), {"pooled": torch.ones(1, WIDTH)})
    device = torch.device("cpu")
    assert OF_NETWORK.key(*arguments, device) is None
    with torch.no_grad():
        assert OF_NETWORK.key(*arguments, device) is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert OF_NETWORK.key(*arguments, device) is None


def test_there_is_no_key_for_a_forward_that_somebody_wraps(monkeypatch):
    network = Network()
    original = Network.forward
    arguments = (network, (torch.zeros(1, 2, WIDTH), torch.ones(1)), {"pooled": torch.ones(1, WIDTH)})

    def hidden(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    def renamed(self, x, t, pooled):
        return original(self, x, t, pooled)

    def wrapped(self, x, time, pooled, context=None, **more):
        return original(self, x, time, pooled, context, **more)

    with torch.no_grad():
        before = OF_NETWORK.key(*arguments, torch.device("cpu"))
        for forward in (hidden, renamed):
            monkeypatch.setattr(Network, "forward", forward)
            assert OF_NETWORK.key(*arguments, torch.device("cpu")) is None
        monkeypatch.setattr(Network, "forward", wrapped)
        assert OF_NETWORK.key(*arguments, torch.device("cpu")) not in (None, before)
        too_many = (network, (*arguments[1], *range(3)), {})
        assert OF_NETWORK.key(*too_many, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("conditioning", "inside", "outside"),
    [
        (
            FLUX,
            "double_blocks.3.img_mod.lin single_blocks.0.modulation.lin final_layer.adaLN_modulation.1 "
            "time_in.in_layer vector_in.out_layer",
            "double_blocks.3.img_attn.qkv single_blocks.0.linear1 final_layer.linear txt_in img_in",
        ),
        (
            SD3,
            "joint_blocks.0.x_block.adaLN_modulation.1 joint_blocks.7.context_block.adaLN_modulation.1 "
            "final_layer.adaLN_modulation.1 t_embedder.mlp.0 y_embedder.mlp.2",
            "joint_blocks.0.x_block.mlp.fc1 context_embedder final_layer.linear x_embedder.proj",
        ),
    ],
)
def test_the_layers_are_those_of_the_modulation(conditioning, inside, outside):
    def covered(name: str) -> bool:
        return conditioning.covers(type("Layer", (), {"name": f"diffusion_model.{name}"}))

    assert all(map(covered, inside.split()))
    assert not any(map(covered, outside.split()))


# ------------------------------------------------------------------------------------ the demo's Flux
@pytest.fixture
def flux(tmp_path, request):
    make_demo_file(tmp_path / "model.gguf", "Q4_K", hidden=256, double=2, single=3)
    hosts = []

    def make(device: str, settings: Settings = SWAPPING) -> StandaloneHost:
        hosts.append(StandaloneHost(tmp_path / "model.gguf", torch.device(device), settings))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


def spared(host: StandaloneHost) -> int:
    return host.snapshot()["models"][0]["bytes"]["spared_per_step"]


def test_the_demo_makes_the_same_latent_from_kept_outputs(flux):
    host = flux("cpu")
    first, whole = host.generate()
    assert spared(host) == 0
    hashes = {first.sha256, host.generate()[0].sha256}
    again, less = host.generate()
    assert hashes == {again.sha256}
    sizes = {layer["name"]: layer["bytes"] for layer in host.snapshot()["models"][0]["layers"]}
    modulation = sum(size for name, size in sizes.items() if CONDITIONING._pattern.search(name))
    assert spared(host) == modulation > 0.25 * sum(sizes.values())
    assert less.h2d_bytes_per_step == pytest.approx(whole.h2d_bytes_per_step - modulation, rel=0.01)


def test_the_demo_computes_its_first_image_ahead(flux, monkeypatch):
    monkeypatch.setattr(look_ahead.LookAhead, "_pays", lambda _self, _steps: True)
    settings = dataclasses.replace(SWAPPING, steps=6)
    host = flux("cpu", settings)
    first, _ = host.generate()
    assert spared(host) > 0
    plain, _ = flux("cpu", dataclasses.replace(settings, keeps_outputs=False)).generate()
    assert first.sha256 == plain.sha256


def test_the_demo_keeps_nothing_where_nobody_wants_it(flux):
    host = flux("cpu")
    first, _ = host.generate()
    assert host.snapshot()["models"][0]["bytes"]["kept_outputs"] > 0
    host.apply({"qswap_keep_outputs": False})
    assert {host.generate()[0].sha256 for _ in range(3)} == {first.sha256}
    size = host.snapshot()["models"][0]["bytes"]
    assert size["kept_outputs"] == size["spared_per_step"] == 0


@pytest.mark.simgpu
@pytest.mark.parametrize("location", ["shared", "cpu", "disk"])
def test_kept_outputs_are_right_however_late_the_device_computes(flux, sim, location):
    sim.set_async_compute(True)
    sim.set_bandwidth(h2d=400e6, d2h=50e6)
    host = flux("simgpu", Settings(location, Budget(share=0.5), steps=4, pixels=64))
    hashes = {host.generate()[0].sha256 for _ in range(3)}
    assert len(hashes) == 1
    assert spared(host) > 0
    assert not any(sim.hazards().values())


@pytest.mark.simgpu
@pytest.mark.usefixtures("sim")
def test_a_step_that_waits_for_the_link_is_shorter_for_another_image(tmp_path):
    import one_token_layers
    from step_rigs import SimulatedRig

    rig = SimulatedRig(demo_file("Q4_K", hidden=256, folder=tmp_path), compute_s=1.0, virtual=True)
    with rig.case(rig.cases["link-bound"], 1.0):
        row = one_token_layers.steps_of_images(rig, 0.25)
    assert row["same"]
    assert not rig.hazards()
    # What travels is the limit before and after.
    share = row["second_image_bytes"] / row["first_image_bytes"]
    assert share < 0.7
    assert row["second_image_s"] == pytest.approx(share * row["first_image_s"], rel=0.05)
    # For a new prompt those layers travel once an image, not hidden by anything.
    travels_once = (1 - share) / one_token_layers.STEPS
    assert row["new_prompt_s"] == pytest.approx((share + travels_once) * row["first_image_s"], rel=0.05)
    assert row["new_alone_prompt_s"] == pytest.approx(row["first_image_s"], rel=0.05)
    # So they do for a first image, but in its first steps, which are measured.
    alone = 3 / one_token_layers.STEPS
    told = alone + (1 - alone) * share + travels_once
    assert row["told_image_s"] == pytest.approx(told * row["first_image_s"], rel=0.07)

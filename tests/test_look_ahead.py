"""With a new prompt, what depends on it and on the time step alone is computed once for all steps, with the
same bits as in each."""

from __future__ import annotations

import pytest
import torch
from modulated_network import DEPENDENT, INDEPENDENT, TIMES, WIDTH, Setup, equal, makers
from modulated_network import OF_NETWORK as WITHOUT_LEAST

from lib_qswap.swap import ledger, look_ahead
from lib_qswap.swap.conditioning import Conditioning
from lib_qswap.swap.layer import Measured


def least(named, count):
    return {"x": named["x"][:, :1].repeat(count, 1, 1)}


def of_network(least=least, layers=r"(^|\.)(time_in|modulation\.1)$") -> Conditioning:
    return Conditioning(("time", "pooled"), ("x", "context"), layers, least=least)


class Images(Setup):
    """Counts its steps as a host does that says how many there are."""

    def image(self, times=TIMES, *, told=None, **more):
        self.attachment.run.begin(len(times), None if told is None else torch.tensor(told))
        found = super().image(times, **more)
        self.attachment.run.end()
        return found

    def prompt(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        return {"pooled": torch.randn(1, WIDTH, generator=generator).to(self.device)}

    def used_in_steps(self, run) -> list[set[str]]:
        """Which layers each step of `run` uses, whatever was used before it."""
        found, before = [], {}

        def begin(_module, _args):
            before.clear()
            before.update(self.uses)

        def end(_module, _args, _output):
            found.append({name for name, count in self.uses.items() if count > before[name]})

        # After those of the engine, which look ahead.
        hooks = [self.network.register_forward_pre_hook(begin), self.network.register_forward_hook(end)]
        run()
        for hook in hooks:
            hook.remove()
        return found


ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU here"),
]


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("simgpu", marks=pytest.mark.simgpu),
        pytest.param("cuda", marks=ON_GPU),
    ]
)
def setup(request):
    if request.param == "simgpu":
        request.getfixturevalue("sim")
    yield from makers(Images, request.param, conditioning=of_network())


@pytest.fixture(autouse=True)
def always_pays(monkeypatch):
    """Whatever layers of this size take on this machine."""
    own = look_ahead.LookAhead._pays
    monkeypatch.setattr(look_ahead.LookAhead, "_pays", lambda _self, _steps: True)
    return own


@pytest.fixture
def plain(setup):
    """What images look like where nothing is kept."""
    model = setup()
    model.attachment.idle.allowed = False
    return model


def warmed(setup, **options) -> Images:
    """A model that has measured its work, and made an image."""
    model = setup(**options)
    model.image()
    model.image()
    return model


def messages() -> list[str]:
    return [message["text"] for message in ledger.snapshot()["messages"]]


def test_no_step_of_a_new_prompt_runs_those_layers(setup, plain):
    model = warmed(setup)
    for number in range(3):
        images = []
        prompt = model.prompt(number)
        before = model.uses
        used = model.used_in_steps(lambda prompt=prompt: images.extend(model.image(**prompt)))  # noqa: B023
        assert used == [INDEPENDENT] * 4
        assert equal(images, plain.image(**prompt))
        # Each is fetched once for all.
        assert all(model.uses[name] > before[name] for name in DEPENDENT)
    assert equal(model.image(), plain.image())


@pytest.mark.simgpu
def test_their_weights_travel_once_an_image(sim):
    model = warmed(lambda **options: Images("simgpu", conditioning=of_network(), **options))
    sizes = {layer.name: layer.payload_bytes for layer in model.attachment.layers}

    def fetched_bytes(run) -> int:
        sim.synchronize()
        before = sim.stats()["h2d_pinned_bytes"]
        run()
        sim.synchronize()
        return sim.stats()["h2d_pinned_bytes"] - before

    known = fetched_bytes(lambda: model.image())
    new = fetched_bytes(lambda: model.image(**model.prompt(1)))
    once = sum(sizes[name] for name in DEPENDENT)
    ring = model.attachment.state.streamer.ring_bytes
    assert known + once <= new <= known + once + 2 * ring
    model.attachment.detach()


def test_a_batch_of_several_pictures_has_the_same_bits(setup, plain):
    model = setup()
    both = {"pooled": model.prompt(1)["pooled"].expand(2, -1).contiguous()}
    other = {"pooled": torch.cat([model.prompt(number)["pooled"] for number in (2, 3)])}
    for one in (model, plain):
        one.x = one.x.expand(2, -1, -1).contiguous()
    model.image(**both)
    model.image(**both)
    images = []
    used = model.used_in_steps(lambda: images.extend(model.image(**other)))
    assert used == [INDEPENDENT] * 4
    assert equal(images, plain.image(**other))


def test_prompts_that_take_turns_within_a_step_are_both_computed_ahead(setup, plain):
    model = warmed(setup)

    def image(model, first, second):
        model.attachment.run.begin(2 * len(TIMES))
        found = [model.step(t, p["pooled"]) for t in TIMES for p in (first, second)]
        model.attachment.run.end()
        return found

    image(model, model.prompt(1), model.prompt(2))
    image(model, model.prompt(1), model.prompt(2))
    images = []
    prompts = model.prompt(3), model.prompt(4)
    used = model.used_in_steps(lambda: images.extend(image(model, *prompts)))
    assert used == [INDEPENDENT] * 8
    assert equal(images, image(plain, *prompts))


def test_prompts_of_two_lengths_are_each_computed_once(setup, plain):
    """As Forge's that cannot be one batch: their shapes differ where the layers see nothing of it."""
    model = warmed(setup)
    kept = model.attachment.idle.kept
    contexts = [torch.zeros(1, 1, WIDTH, device=model.device), torch.zeros(1, model.x.shape[1], WIDTH)]
    contexts[1] = contexts[1].to(model.device)

    def image(model, *prompts):
        model.attachment.run.begin(2 * len(TIMES))
        both = list(zip(prompts, contexts, strict=True))
        found = [model.step(t, p["pooled"], context=c) for t in TIMES for p, c in both]
        model.attachment.run.end()
        return found

    image(model, model.prompt(1), model.prompt(2))
    image(model, model.prompt(1), model.prompt(2))
    for number in range(3, 30, 2):
        prompts = model.prompt(number), model.prompt(number + 1)
        images = []
        used = model.used_in_steps(lambda prompts=prompts: images.extend(image(model, *prompts)))  # noqa: B023
        assert used == [INDEPENDENT] * 8
        assert kept.nbytes == len(kept._kept) * kept._step_bytes <= kept._limit_bytes
    assert equal(images, image(plain, *prompts))


def test_what_was_stored_ahead_and_is_still_to_come_stays(setup):
    model = warmed(setup)
    kept = model.attachment.idle.kept
    kept._limit_bytes = 6 * kept._step_bytes
    outputs = {
        layer: one[None].repeat(4, *[1] * one.dim())
        for layer, one in kept.outputs_of(next(iter(kept._kept))).items()
    }
    kept.store_ahead(["a0", "a1", "a2", "a3"], outputs)
    assert all(f"a{step}" in kept for step in range(4))
    kept.store_ahead(["b0", "b1", "b2", "b3"], outputs)
    assert [key for key in kept._kept if isinstance(key, str)] == ["a0", "a1", "a2", "a3", "b0", "b1"]
    for step in range(4):
        assert kept.begin(f"a{step}")
        kept.end()
    kept.store_ahead(["c0", "c1", "c2", "c3"], outputs)
    assert all(f"c{step}" in kept for step in range(4))
    assert kept.nbytes == len(kept._kept) * kept._step_bytes <= kept._limit_bytes


def test_what_was_stored_ahead_of_a_run_that_was_broken_off_makes_room(setup):
    model = warmed(setup)
    kept, prompts = model.attachment.idle.kept, [model.prompt(number) for number in range(1, 4)]
    kept._limit_bytes = (len(TIMES) + 1) * kept._step_bytes
    for prompt in prompts[:2]:
        model.attachment.run.begin(len(TIMES))
        model.step(TIMES[0], **prompt)  # and no further
    assert any(one.asked > kept._asked for one in kept._kept.values())
    model.attachment.run.begin(len(TIMES))
    model.step(TIMES[0], **prompts[2])
    to_come = [one for one in kept._kept.values() if one.asked > kept._asked]
    assert len(to_come) == len(TIMES) - 1, "of this run, all of them"


@pytest.mark.parametrize("what", ["memory", "room"])
def test_what_does_not_work_in_a_run_is_not_tried_again_in_it(setup, monkeypatch, what):
    model = warmed(setup)
    kept, tried = model.attachment.idle.kept, []
    rehearse = look_ahead.LookAhead._rehearse

    def counted(self, asked, keys):
        tried.append(len(keys))
        if what == "memory":
            raise torch.cuda.OutOfMemoryError("the device is full")
        return rehearse(self, asked, keys)

    monkeypatch.setattr(look_ahead.LookAhead, "_rehearse", counted)
    if what == "room":
        monkeypatch.setattr(kept, "store_ahead", lambda _keys, _outputs: None)
    model.image(**model.prompt(1))
    model.image(**model.prompt(2))
    assert len(tried) == 2


def test_a_model_that_gave_up_its_memory_runs_on(setup, plain):
    model = warmed(setup)
    model.attachment.give_up(1 << 40)
    assert model.attachment.budget_bytes is None
    assert equal(model.image(**model.prompt(1)), plain.image(**model.prompt(1)))


@pytest.mark.simgpu
@pytest.mark.usefixtures("sim")
def test_it_is_judged_by_the_times_of_its_own_work():
    model = warmed(lambda: Images("simgpu", conditioning=of_network(), budget_bytes=0))
    attachment, x = model.attachment, model.x
    works = {}
    for tokens in (8, 4):
        model.x = x[:, :tokens]
        model.image()
        model.image()
        (works[tokens],) = {work for work in attachment.layers[0].times.by_work if work not in works.values()}
    model.x = x
    assert attachment.adaptation.profile.is_in_use(works[4])
    judged = []
    attachment.idle.ahead._pays = lambda _steps: judged.append(attachment.layers[0].times.measured)
    model.image(**model.prompt(1))
    assert judged == [attachment.layers[0].times.by_work[works[8]]]
    assert attachment.adaptation.profile.is_in_use(works[8])
    attachment.detach()


def test_other_times_than_expected_are_computed(setup, plain):
    model = warmed(setup)
    times = (1.0, 0.75, 0.4, 0.2)
    images = []
    used = model.used_in_steps(lambda: images.extend(model.image(times, **model.prompt(1))))
    assert used[:2] == [INDEPENDENT] * 2
    assert used[2] == DEPENDENT | INDEPENDENT
    assert equal(images, plain.image(times, **model.prompt(1)))
    # Another time has followed 0.75 before: this one is no guess until it has come twice in a row.
    images = []
    used = model.used_in_steps(lambda: images.extend(model.image(times, **model.prompt(2))))
    assert used[:2] == [INDEPENDENT] * 2
    used = model.used_in_steps(lambda: images.extend(model.image(times, **model.prompt(3))))
    assert used == [INDEPENDENT] * 4
    assert equal(images, [one for n in (2, 3) for one in plain.image(times, **plain.prompt(n))])


def test_pictures_of_two_sizes_have_their_own_times(setup, plain):
    model = setup()
    sizes = {8: TIMES, 4: (1.0, 0.6, 0.5, 0.1)}
    x = model.x
    for number in range(3):
        for tokens, times in sizes.items():
            model.x = plain.x = x[:, :tokens]
            images = []
            prompt = model.prompt(10 * number + tokens)
            used = model.used_in_steps(lambda: images.extend(model.image(times, **prompt)))  # noqa: B023
            assert equal(images, plain.image(times, **prompt))
            assert number < 2 or used == [INDEPENDENT] * 4


LONG = tuple(1 - step / 8 for step in range(8))


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_first_image_is_computed_ahead_where_its_times_are_told(setup, plain, pictures):
    model = setup()
    prompt = {"pooled": model.prompt(1)["pooled"].repeat(pictures, 1)}
    for one in (model, plain):
        one.x = one.x.repeat(pictures, 1, 1)
    images = []
    used = model.used_in_steps(lambda: images.extend(model.image(LONG, told=LONG, **prompt)))
    # Steps have to be measured first, and one to be kept that the others are checked by.
    assert used[:2] == [DEPENDENT | INDEPENDENT] * 2
    assert used[3:] == [INDEPENDENT] * 5
    assert equal(images, plain.image(LONG, **prompt))


def test_what_is_told_wrongly_is_of_no_consequence(setup, plain):
    model = setup()
    for number, told in enumerate(((0.9, 0.8, 0.7), (*LONG[:3], 0.51, 0.41), (), LONG[::-1])):
        prompt = model.prompt(number)
        assert equal(model.image(LONG, told=told, **prompt), plain.image(LONG, **prompt))


def test_what_was_told_for_one_run_is_forgotten_with_it(setup):
    run = setup().attachment.run
    for end in (run.end, lambda: run.begin(4), lambda: run.progress(1, 4)):
        run.begin(4, torch.tensor(TIMES))
        assert run.times is not None
        end()
        assert run.times is None
    run.progress(1, 4)
    run.times = torch.tensor(TIMES)
    run.progress(2, 4)
    assert run.times is not None
    run.progress(1, 4)
    assert run.times is None
    # A run that was broken off in its first step, and another one.
    run.times, number = torch.tensor(TIMES), run.number
    run.progress(1, 4)
    assert run.times is not None, "a sampler may call the network twice a step"
    run.progress(1, 3)
    assert run.times is None
    assert run.number == number + 1


@pytest.mark.parametrize("what", ["no length", "one step", "another length", "does not pay", "no least"])
def test_where_nothing_is_to_be_gained_each_step_computes_its_own(setup, plain, monkeypatch, what):
    options = {"conditioning": WITHOUT_LEAST} if what == "no least" else {}
    model = warmed(setup, **options)
    times = {"one step": TIMES[:1], "another length": TIMES[:3]}.get(what, TIMES)
    if what == "does not pay":
        monkeypatch.setattr(look_ahead.LookAhead, "_pays", lambda _self, _steps: False)
    image = (lambda m, **more: Setup.image(m, times, **more)) if what == "no length" else None
    image = image or (lambda m, **more: m.image(times, **more))
    images = []
    used = model.used_in_steps(lambda: images.extend(image(model, **model.prompt(1))))
    assert used[0] == DEPENDENT | INDEPENDENT
    assert equal(images, image(plain, **model.prompt(1)))


def test_a_plan_that_gains_too_little_for_the_transfer_does_not_pay(setup, always_pays):
    model = warmed(setup)
    attachment = model.attachment
    for layer in attachment.layers:
        layer.times.measured = Measured(0.01, 0.01)
    # Five layers compute for 0.05 s, ahead as well as in each step.
    step_s = {True: 0.545, False: 0.4}
    covered = sum(layer.payload_bytes for layer in attachment.idle.kept.layers)
    attachment.make_plan = lambda _budget, layers: attachment.plan._replace(
        step_s=step_s[len(layers) == len(attachment.layers)]
    )
    taken_s = 0.35 - 4 * 5 * look_ahead.HOST_S
    attachment.link_bytes_per_s = lambda: covered / taken_s
    assert not always_pays(attachment.idle.ahead, 3)
    assert always_pays(attachment.idle.ahead, 4)


def test_where_no_step_waits_no_other_plan_is_made(setup, always_pays):
    attachment = warmed(setup).attachment
    for layer in attachment.layers:
        layer.times.measured = Measured(0.01, 0.01)
    asked = []

    def make_plan(_budget, layers):
        asked.append(len(layers))
        return attachment.plan._replace(step_s=0.01 * len(layers))

    attachment.make_plan = make_plan
    assert not always_pays(attachment.idle.ahead, 20)
    assert asked == [len(attachment.layers)]


def test_layers_that_depend_on_something_else_are_found_out(setup, plain):
    """As a network would whose code has changed."""
    model = warmed(setup, conditioning=of_network(layers=r"(^|\.)(time_in|modulation\.1|blocks\.0\.up)$"))
    model.x = model.x + 1  # What is kept is wrong already; a rehearsal would be, too.
    model.image(**model.prompt(1))
    assert any("differs from what a step gave" in text for text in messages())
    used = model.used_in_steps(lambda: model.image(**model.prompt(2)))
    assert used[0] == DEPENDENT | INDEPENDENT


@pytest.mark.parametrize("kind", ["error", "memory", "shape"])
def test_a_rehearsal_that_fails_leaves_nothing_behind(setup, plain, kind):
    broken = True

    def fail(named, count):
        if not broken:
            return least(named, count)
        if kind == "error":
            raise KeyError("x")
        if kind == "memory":
            raise torch.cuda.OutOfMemoryError("the device is full")
        return {"x": named["x"].repeat(2 * count, 1, 1), "context": named["x"][0, 0, 0]}

    model = warmed(setup, conditioning=of_network(fail))
    forwards = {name: module.__dict__.get("forward") for name, module in model.network.named_modules()}
    images = []
    used = model.used_in_steps(lambda: images.extend(model.image(**model.prompt(1))))
    assert used[0] == DEPENDENT | INDEPENDENT
    after = {name: module.__dict__.get("forward") for name, module in model.network.named_modules()}
    assert after == forwards
    assert equal(images, plain.image(**model.prompt(1)))
    broken = False
    images = []
    used = model.used_in_steps(lambda: images.extend(model.image(**model.prompt(2))))
    # Memory can be there the next time.
    assert used[0] == (INDEPENDENT if kind == "memory" else DEPENDENT | INDEPENDENT)
    assert equal(images, plain.image(**model.prompt(2)))


def test_a_forward_that_somebody_has_put_in_place_is_not_rehearsed(setup, monkeypatch):
    model = warmed(setup)
    calls = []
    namespace = {"calls": calls}
    exec(  # Its code is of another file.
        "def forward(self, x, time, pooled, context=None, **more):\n"
        "    calls.append(len(x))\n"
        "    return own(self, x, time, pooled, context, **more)\n",
        namespace,
    )
    namespace["own"] = type(model.network).forward
    monkeypatch.setattr(type(model.network), "forward", namespace["forward"])
    for number in range(3):
        model.image(**model.prompt(number))
    assert calls == [1] * 12


def test_what_is_kept_stays_within_its_share(setup, plain):
    model = warmed(setup)
    kept = model.attachment.idle.kept
    kept._limit_bytes = 6 * kept._step_bytes
    for number in range(5):
        images = []
        prompt = model.prompt(number)
        used = model.used_in_steps(lambda prompt=prompt: images.extend(model.image(**prompt)))  # noqa: B023
        assert used == [INDEPENDENT] * 4
        assert equal(images, plain.image(**prompt))
        assert kept.nbytes <= kept._limit_bytes


def test_residents_make_room_and_stay_right(setup):
    probe = setup()
    largest = max(layer.payload_bytes for layer in probe.attachment.layers)
    budget = probe.attachment.floor_bytes + 4 * largest
    model, plain = warmed(setup, budget_bytes=budget), setup(budget_bytes=budget)
    plain.attachment.idle.allowed = False
    for number in range(3):
        assert equal(model.image(**model.prompt(number)), plain.image(**model.prompt(number)))


@pytest.mark.simgpu
@pytest.mark.usefixtures("sim")
@pytest.mark.parametrize("more", [None, 0, 1, 2])
def test_the_ring_has_room_for_layers_that_are_larger_than_those_that_run(more):
    """more: layers beside the floor; None: a budget below it."""
    model = Images("simgpu", conditioning=of_network(), budget_bytes=0)
    attachment = model.attachment
    modulation, up = (
        next(layer.payload_bytes for layer in attachment.layers if layer.name.endswith(end))
        for end in ("modulation.1", "up")
    )
    assert modulation > up
    budget = 0 if more is None else attachment.floor_bytes + more * up
    attachment.rebalance(budget)
    for number in (1, 1, 2, 3):
        used = model.used_in_steps(lambda number=number: model.image(**model.prompt(number)))
        attachment.unload()
        attachment.rebalance(budget)
        ring_bytes = attachment.state.streamer.ring_bytes
        assert ring_bytes >= modulation
        taken = attachment.resident_bytes + ring_bytes + attachment.fixed_bytes
        assert taken <= max(budget, attachment.floor_bytes)
    assert not set.union(*used) & DEPENDENT
    attachment.detach()


@pytest.mark.parametrize("more", [0, 1000, 300_000])
def test_a_ring_that_takes_not_all_that_is_left_is_made_larger(setup, more):
    attachment = setup().attachment
    plan, left = attachment.plan, 512
    covered = attachment.idle.kept.layers
    others = [layer for layer in attachment.layers if layer not in covered]
    least = max(layer.payload_bytes for layer in covered)

    def make(_costs, *, budget_bytes, link_bytes_per_s, ring_bytes):
        return plan._replace(ring_bytes=budget_bytes - left if ring_bytes is None else ring_bytes)

    attachment._plans.make = make
    ring = attachment.make_plan(attachment.floor_bytes + more, others).ring_bytes
    assert least <= ring <= least + more


@pytest.mark.simgpu
@pytest.mark.usefixtures("compute_mode")
@pytest.mark.parametrize("location", ["shared", "cpu"])
def test_it_is_right_however_late_the_device_computes(sim, location):
    sim.set_bandwidth(h2d=400e6, d2h=50e6)
    models = [
        Images("simgpu", conditioning=of_network(), location=location, budget_bytes=2 << 20) for _ in "ab"
    ]
    models[1].attachment.idle.allowed = False
    for number in range(4):
        ours, others = (one.image(**one.prompt(number)) for one in models)
        assert equal(ours, others)
    assert not any(sim.hazards().values())
    for one in models:
        one.attachment.detach()

"""The planner: its promises, its step model against arithmetic, its plans against a long search."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_speed import comparable_seconds

from lib_qswap.swap.planner import LayerCost, bound_step, least_step, make_plan, predict_step, spread
from lib_qswap.swap.step_model import Streaming

MB = 10**6
HIDDEN = 3072


def layer(name, megabytes, milliseconds):
    return LayerCost(str(name), round(megabytes * MB), milliseconds / 1e3)


def equal_layers(count, megabytes=10, milliseconds=1):
    return [layer(i, megabytes, milliseconds) for i in range(count)]


def flux(bits_per_weight, tflops, image_tokens=4096, text_tokens=512):
    """The Linears of FLUX.1: 19 double, 38 single blocks; modulation sees one token, which costs no time."""
    layers = []

    def add(name, inputs, outputs, tokens):
        seconds = 0.0 if tokens == 1 else 2 * inputs * outputs * tokens / (tflops * 1e12)
        layers.append(LayerCost(name, round(inputs * outputs * bits_per_weight / 8), seconds))

    for block in range(19):
        streams = (("img", image_tokens), ("txt", text_tokens))
        for stream, _ in streams:
            add(f"double.{block}.{stream}_mod", HIDDEN, 6 * HIDDEN, 1)
        for stream, tokens in streams:
            add(f"double.{block}.{stream}_qkv", HIDDEN, 3 * HIDDEN, tokens)
        for stream, tokens in streams:
            add(f"double.{block}.{stream}_proj", HIDDEN, HIDDEN, tokens)
            add(f"double.{block}.{stream}_mlp.0", HIDDEN, 4 * HIDDEN, tokens)
            add(f"double.{block}.{stream}_mlp.2", 4 * HIDDEN, HIDDEN, tokens)
    tokens = image_tokens + text_tokens
    for block in range(38):
        add(f"single.{block}.modulation", HIDDEN, 3 * HIDDEN, 1)
        add(f"single.{block}.linear1", HIDDEN, 7 * HIDDEN, tokens)
        add(f"single.{block}.linear2", 5 * HIDDEN, HIDDEN, tokens)
    return layers


def total_bytes(layers):
    return sum(x.nbytes for x in layers)


def resident_bytes(layers, plan):
    kept = set(plan.resident)
    return sum(x.nbytes for x in layers if x.name in kept)


def plan_for(layers, share, link, **kwargs):
    return make_plan(layers, budget_bytes=int(total_bytes(layers) * share), link_bytes_per_s=link, **kwargs)


def search(layers, budget_bytes, link, start, rounds, seed=0):
    """The step time that simulated annealing over residents and ring finds, started from a plan."""
    rng = random.Random(seed)
    nbytes = [x.nbytes for x in layers]
    streaming = Streaming(layers, link)
    kept = set(start.resident)
    swapped, ring = [x.name not in kept for x in layers], start.ring_bytes
    current = best = streaming.step_s(swapped, ring)
    heat = 0.004 * current
    for done in range(rounds):
        tried = list(swapped)
        for _ in range(rng.choice((1, 2, 2, 2, 3, 4))):
            i = rng.randrange(len(tried))
            tried[i] = not tried[i]
        tried_ring = (
            ring if rng.random() < 0.85 else int(ring * rng.choice((0.8, 0.9, 0.95, 1.05, 1.1, 1.25)))
        )
        tried_ring = max(tried_ring, *(n for n, fetched in zip(nbytes, tried, strict=True) if fetched), 1)
        over = tried_ring - budget_bytes
        over += sum(n for n, fetched in zip(nbytes, tried, strict=True) if not fetched)
        for i in rng.sample(range(len(tried)), len(tried)):
            if over <= 0:
                break
            if not tried[i] and nbytes[i] <= tried_ring:
                tried[i] = True
                over -= nbytes[i]
        if over > 0:
            continue
        step = streaming.step_s(tried, tried_ring)
        best = min(best, step)
        cold = heat * (1 - done / rounds) + 1e-15
        if step < current or rng.random() < math.exp((current - step) / cold):
            swapped, ring, current = tried, tried_ring, step
    return best


# ---- the step model, against arithmetic


def test_resident_layers_take_their_compute_time():
    layers = equal_layers(10)
    step = predict_step(layers, [x.name for x in layers], ring_bytes=0, link_bytes_per_s=1e9)
    assert step == pytest.approx(0.010)


def test_a_ring_of_one_slot_leaves_no_overlap():
    # 4 layers of 10 MB at 10 GB/s: 1 ms of copy, then 1 ms of compute, each waiting for the other
    step = predict_step(equal_layers(4), [], ring_bytes=10 * MB, link_bytes_per_s=1e10)
    assert step == pytest.approx(4 * (0.001 + 0.001))


def test_a_ring_of_two_slots_hides_copies_as_long_as_compute():
    step = predict_step(equal_layers(4), [], ring_bytes=20 * MB, link_bytes_per_s=1e10)
    assert step == pytest.approx(0.004)


def test_a_link_that_is_never_idle_sets_the_step_time():
    # 40 MB a step at 4 GB/s
    step = predict_step(equal_layers(4), [], ring_bytes=20 * MB, link_bytes_per_s=4e9)
    assert step == pytest.approx(0.010)


def test_copies_overlap_the_compute_of_residents():
    # b's 30 MB take 3 ms, while a (2 ms) and c (2 ms) compute: of the cycle's 5 ms, b's copy has 4
    layers = [layer("a", 10, 2), layer("b", 30, 1), layer("c", 10, 2)]
    assert predict_step(layers, ["a", "c"], ring_bytes=30 * MB, link_bytes_per_s=1e10) == pytest.approx(0.005)
    # at half the bandwidth it takes 6 ms, its slot is free for 4 ms of compute, so 2 ms are waited for
    assert predict_step(layers, ["a", "c"], ring_bytes=30 * MB, link_bytes_per_s=5e9) == pytest.approx(0.007)


def test_slots_are_contiguous_so_the_ring_s_end_may_go_unused():
    # 25 MB hold two slots of 10 MB, not two and a half: the same as 20 MB
    layers = [layer(i, 10, (3, 0, 1, 0)[i % 4]) for i in range(8)]
    steps = [predict_step(layers, [], ring_bytes=r * MB, link_bytes_per_s=1e10) for r in (20, 25, 30)]
    assert steps[0] == pytest.approx(steps[1])
    assert steps[2] < steps[1]


def test_a_slot_is_free_when_its_layer_has_read_it():
    # 1 ms of copy, read in 0.25 ms, 0.75 ms more of compute in which the next one is copied
    layers = [LayerCost(str(i), 10 * MB, 0.001, 0.00025) for i in range(4)]
    step = predict_step(layers, [], ring_bytes=10 * MB, link_bytes_per_s=1e10)
    assert step == pytest.approx(4 * (0.001 + 0.00025))


def test_no_budget_helps_against_a_stretch_that_has_more_bytes_than_the_link_brings_in_its_time():
    # 10 ms of compute; at 10 GB/s the last four layers, of 40 MB and 1 ms together, take 4 ms to come
    layers = [*equal_layers(9), *(layer(i, 10, 0.25) for i in range(9, 13))]
    layers = [x if int(x.name) > 8 else x._replace(nbytes=0) for x in layers]
    least = [least_step(layers, budget_bytes=b * MB, link_bytes_per_s=1e10) for b in (0, 10, 20, 40, 100)]
    assert least == pytest.approx([0.013, 0.012, 0.011, 0.010, 0.010])
    # the same stretch, over the end of the step
    turned = layers[11:] + layers[:11]
    assert least_step(turned, budget_bytes=10 * MB, link_bytes_per_s=1e10) == pytest.approx(0.012)


def test_a_layer_larger_than_the_ring_is_refused():
    with pytest.raises(ValueError, match="10000000 bytes does not fit into a ring of 5000000 bytes"):
        predict_step(equal_layers(4), [], ring_bytes=5 * MB, link_bytes_per_s=1e10)


def test_the_bound_is_compute_or_transfer_whichever_is_longer():
    layers = equal_layers(10)
    assert bound_step(layers, [], link_bytes_per_s=1e9) == pytest.approx(0.1)
    assert bound_step(layers, ["0"], link_bytes_per_s=1e9) == pytest.approx(0.09)
    assert bound_step(layers, [], link_bytes_per_s=1e11) == pytest.approx(0.01)


def brute_force_step(layers, resident, ring_bytes, link, steps=40):
    """The same streamer, simulated byte range by byte range: a slot waits for whatever overlaps it."""
    live = []  # (start, end, freed at), ring addresses
    head = 0
    copied = computed = 0.0
    ends = []
    for _ in range(steps):
        for x in layers:
            if x.name in resident:
                computed += x.compute_s
                continue
            start = head if head + x.nbytes <= ring_bytes else 0
            # first in, first out: everything up to the latest slot that is overlapped must have been freed
            skipped = range(head, ring_bytes) if start == 0 and head else range(0)
            wait = [
                freed
                for low, high, freed in live
                if (low < start + x.nbytes and start < high) or (low < skipped.stop and skipped.start < high)
            ]
            live = [
                s
                for s in live
                if not (
                    (s[0] < start + x.nbytes and start < s[1])
                    or (s[0] < skipped.stop and skipped.start < s[1])
                )
            ]
            copied = max([copied, *wait]) + x.nbytes / link
            computed = max(computed, copied)
            read_s = x.compute_s if x.read_s is None else x.read_s
            live.append((start, start + x.nbytes, computed + read_s))
            computed += x.compute_s
            head = start + x.nbytes
        ends.append(computed)
    return (ends[-1] - ends[steps // 2 - 1]) / (steps - steps // 2)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_step_model_equals_a_simulation_of_the_ring_s_bytes(data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    times = data.draw(st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)))
    reads = [data.draw(st.none() | st.integers(0, time)) for time in times]
    layers = [LayerCost(str(i), *cost) for i, cost in enumerate(zip(sizes, times, reads, strict=True))]
    resident = {x.name for x in layers if data.draw(st.booleans())}
    ring = data.draw(st.integers(9, 30))
    streaming = Streaming(layers, 1.0)
    swapped = [x.name not in resident for x in layers]
    got = streaming.step_s(swapped, ring, averaged_steps=40)
    want = brute_force_step(layers, resident, ring, 1.0)
    assert got == pytest.approx(want, rel=0.02, abs=ring / 15)


# ---- spread


@given(st.lists(st.floats(0, 100, allow_nan=False), max_size=60), st.floats(0, 1, allow_nan=False))
def test_spread_stays_within_half_of_the_largest_weight_at_every_point(weights, share):
    chosen = spread(weights, share)
    assert len(chosen) == len(weights)
    taken = passed = 0.0
    for weight, take in zip(weights, chosen, strict=True):
        passed += weight
        taken += weight * take
        assert abs(taken - share * passed) <= max(weights) / 2 + 1e-6


def test_spread_alternates_equal_weights_and_takes_all_or_none_at_the_ends():
    assert spread([1, 1, 1, 1], 0.5) == [True, False, True, False]
    assert spread([5, 0, 2], 1) == [True, True, True]
    assert spread([5, 0, 2], 0) == [False, False, False]


def test_spread_refuses_a_share_outside_0_to_1():
    with pytest.raises(ValueError, match="between 0 and 1"):
        spread([1], 1.5)


# ---- promises for any model

models = st.lists(
    st.tuples(st.integers(0, 60 * MB), st.floats(0, 0.01, allow_nan=False), st.none() | st.floats(0, 1)),
    min_size=1,
    max_size=25,
).map(
    lambda rows: [
        LayerCost(str(i), n, s, None if read is None else read * s) for i, (n, s, read) in enumerate(rows)
    ]
)
links = st.floats(1e8, 5e10, allow_nan=False)


@settings(deadline=None, max_examples=50)
@given(models, st.floats(0, 1.2), links, st.none() | st.integers(0, 100 * MB))
def test_a_plan_never_exceeds_its_budget_and_never_beats_its_bound(layers, share, link, ring):
    budget = int(total_bytes(layers) * share)
    plan = make_plan(layers, budget_bytes=budget, link_bytes_per_s=link, ring_bytes=ring)
    largest = max(x.nbytes for x in layers)
    assert resident_bytes(layers, plan) + plan.ring_bytes <= plan.budget_bytes
    assert plan.budget_bytes == max(budget, min(largest, total_bytes(layers)))
    assert (plan.budget_bytes > budget) <= (plan.message is not None)
    assert plan.step_s >= plan.bound_s * (1 - 1e-9)
    assert plan.bound_s == bound_step(layers, plan.resident, link_bytes_per_s=link)
    least_s = least_step(layers, budget_bytes=plan.budget_bytes, link_bytes_per_s=link)
    assert plan.step_s >= least_s * (1 - 1e-9)
    predicted = predict_step(layers, plan.resident, ring_bytes=plan.ring_bytes, link_bytes_per_s=link)
    assert plan.step_s == predicted
    order = [x.name for x in layers]
    assert list(plan.resident) == [name for name in order if name in set(plan.resident)]


@settings(deadline=None, max_examples=10)
@given(models, st.floats(0, 1), links)
def test_the_same_question_gets_the_same_plan(layers, share, link):
    assert plan_for(layers, share, link) == plan_for(layers, share, link)


@settings(deadline=None, max_examples=20)
@given(models, st.floats(0, 1), st.floats(0, 1), links)
def test_more_budget_is_hardly_ever_slower(layers, one, other, link):
    less, more = sorted((one, other))
    assert plan_for(layers, more, link).step_s <= plan_for(layers, less, link).step_s * 1.05 + 1e-9


def test_a_model_that_fits_is_resident_without_a_ring():
    layers = equal_layers(5)
    plan = make_plan(layers, budget_bytes=50 * MB, link_bytes_per_s=1e9)
    assert plan.resident == ("0", "1", "2", "3", "4")
    assert (plan.ring_bytes, plan.message) == (0, None)
    assert plan.step_s == plan.bound_s == pytest.approx(0.005)


def test_a_budget_below_the_largest_layer_is_raised_to_it_with_a_message():
    layers = [*equal_layers(5), layer("giant", 400, 5)]
    plan = make_plan(layers, budget_bytes=100 * MB, link_bytes_per_s=1e9)
    assert (plan.budget_bytes, plan.ring_bytes, plan.resident) == (400 * MB, 400 * MB, ())
    assert "95 MB" in plan.message, "of 2**20 bytes, as in the settings"
    assert "381 MB" in plan.message


def test_a_ring_that_is_asked_for_is_kept_or_changed_with_a_message():
    layers = equal_layers(20)
    plan = make_plan(layers, budget_bytes=100 * MB, link_bytes_per_s=1e10, ring_bytes=30 * MB)
    assert (plan.ring_bytes, plan.message) == (30 * MB, None)
    plan = make_plan(layers, budget_bytes=100 * MB, link_bytes_per_s=1e10, ring_bytes=3 * MB)
    assert plan.ring_bytes == 10 * MB
    assert "3 MB" in plan.message
    plan = make_plan(layers, budget_bytes=100 * MB, link_bytes_per_s=1e10, ring_bytes=300 * MB)
    assert plan.ring_bytes == 100 * MB
    assert "286 MB" in plan.message
    plan = make_plan(layers, budget_bytes=100 * MB, link_bytes_per_s=1e10, ring_bytes=100 * MB + 1000)
    assert (plan.ring_bytes, plan.message) == (100 * MB, None), "the same in megabytes"


def test_tiny_layers_are_resident_first():
    layers = [*equal_layers(20), *(layer(f"tiny{i}", 0.5, 0) for i in range(10))]
    plan = make_plan(layers, budget_bytes=60 * MB, link_bytes_per_s=1e10)
    assert {f"tiny{i}" for i in range(10)} <= set(plan.resident)


def test_layers_that_do_not_compute_are_resident_first_where_the_link_is_slow():
    layers = flux(8.5, 12)
    plan = plan_for(layers, 0.5, 8e9)
    idle = {x.name for x in layers if x.compute_s == 0}
    assert idle <= set(plan.resident)


def test_layers_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        make_plan([layer("a", 1, 1), layer("a", 2, 1)], budget_bytes=MB, link_bytes_per_s=1e9)


def test_no_layers_need_no_plan():
    plan = make_plan([], budget_bytes=0, link_bytes_per_s=1e9)
    assert (plan.resident, plan.ring_bytes, plan.step_s) == ((), 0, 0)


# ---- judged by searches that take much longer


@pytest.mark.parametrize("seed", range(12))
def test_small_models_are_planned_within_half_a_percent_of_the_best_of_all_subsets(seed):
    rng = random.Random(seed)
    layers = [layer(i, rng.choice((2, 10, 20, 30)), rng.choice((0, 0.5, 1, 3))) for i in range(9)]
    link = rng.choice((5e9, 1e10, 2e10))
    budget = int(total_bytes(layers) * rng.choice((0.35, 0.5, 0.7)))
    plan = make_plan(layers, budget_bytes=budget, link_bytes_per_s=link)
    streaming = Streaming(layers, link)
    best = math.inf
    for swapped in itertools.product((False, True), repeat=len(layers)):
        ring = budget - sum(x.nbytes for x, fetched in zip(layers, swapped, strict=True) if not fetched)
        largest = max((x.nbytes for x, fetched in zip(layers, swapped, strict=True) if fetched), default=0)
        if ring >= largest > 0:
            best = min(best, streaming.step_s(swapped, ring))
    assert plan.step_s <= 1.005 * best


# The last column is the best step that benchmarks/planner_judge.py found.
@pytest.mark.parametrize(
    ("bits_per_weight", "tflops", "tokens", "link", "share", "best_known_s"),
    [
        (4.5, 12, 4096, 12e9, 0.25, 4.957466),
        (4.5, 60, 4096, 8e9, 0.1, 1.041874),
        (4.5, 100, 4096, 8e9, 0.25, 0.653572),
        (8.5, 12, 1024, 8e9, 0.1, 1.821097),
        (8.5, 60, 4096, 12e9, 0.1, 1.140621),
        (8.5, 60, 4096, 8e9, 0.25, 1.203643),
        (8.5, 60, 1024, 12e9, 0.5, 0.531431),
        (8.5, 100, 4096, 8e9, 0.5, 0.805921),
        (8.5, 100, 4096, 24e9, 0.1, 0.636410),
        (8.5, 100, 1024, 24e9, 0.75, 0.198299),
    ],
)
def test_flux_is_planned_within_half_a_percent_of_the_best_that_is_known(
    bits_per_weight, tflops, tokens, link, share, best_known_s
):
    plan = plan_for(flux(bits_per_weight, tflops, tokens), share, link)
    assert plan.step_s <= 1.005 * best_known_s


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(equal_layers(60, 30, 2), id="equal layers"),
        pytest.param([*equal_layers(60, 20, 2), layer("giant", 300, 10)], id="one giant"),
        pytest.param([layer(i, 0.4, 0.05) for i in range(300)], id="all tiny"),
        pytest.param([layer(i, 30, 0) for i in range(40)], id="no compute"),
        pytest.param([layer(i, 60 if i < 20 else 5, 2) for i in range(80)], id="heavy start"),
    ],
)
@pytest.mark.parametrize("link", [6e9, 15e9])
def test_other_shapes_are_planned_within_half_a_percent_of_what_a_local_search_finds(layers, share, link):
    plan = plan_for(layers, share, link)
    best = search(layers, plan.budget_bytes, link, plan, rounds=200)
    assert plan.step_s <= 1.005 * best


def test_planning_is_quick():
    assert comparable_seconds(lambda: plan_for(flux(8.5, 60), 0.1, 12e9)) < 0.5
    many = [layer(i, 0.2 + i % 7, 0.01 * (i % 5)) for i in range(2000)]
    assert comparable_seconds(lambda: plan_for(many, 0.4, 1e10)) < 2

"""The report is what is: homes from storage, states from completed events, from any thread, at no cost."""

from __future__ import annotations

import itertools
import json
import threading
import time

import pytest
import swap_models as sm
import torch

from lib_qswap.swap import ledger
from lib_qswap.swap.manager import attach, attached

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("engine")]

GPU = "simgpu"
F32 = {"compute_dtype": torch.float32}


def only_model():
    (model,) = ledger.snapshot()["models"]
    return model


def states():
    return {layer["name"]: layer["state"] for layer in only_model()["layers"]}


def test_a_snapshot_is_json_and_has_what_the_page_needs(sim):
    model = sm.build()
    floor, whole, _ = sm.sizes(model, GPU, **F32)
    budget = (floor + whole) // 2
    with attached(
        model, device=GPU, location="shared", budget_bytes=budget, name="Mine", **F32
    ) as attachment:
        attachment.run.begin(5)
        assert only_model()["used_at"] == 0
        begun = time.time()
        for _ in range(3):
            sm.run(model, GPU)
        attachment.state.streamer.timeline.collect()
        snapshot = json.loads(json.dumps(ledger.snapshot(), allow_nan=False))
        assert (snapshot["schema"], snapshot["enabled"], snapshot["location"]) == (1, True, "shared")
        assert snapshot["device"] == "simgpu:0"
        (entry,) = snapshot["models"]
        assert (entry["name"], entry["active"]) == ("Mine", True)
        assert begun <= entry["used_at"] <= time.time()
        assert entry["step"]["index"] == 3
        assert entry["step"]["of"] == 5
        assert entry["step"]["seconds"] >= entry["step"]["compute_s"] > 0
        assert entry["step"]["seconds"] == pytest.approx(
            entry["step"]["compute_s"] + entry["step"]["stall_s"], rel=1e-6
        )
        assert entry["step"]["h2d_bytes"] == entry["bytes"]["swapped_per_step"]
        assert entry["step"]["bound_s"] > 0
        swapped = [layer for layer in entry["layers"] if layer["state"] != "resident"]
        resident = [layer for layer in entry["layers"] if layer["state"] == "resident"]
        assert swapped
        assert resident
        assert sum(layer["bytes"] for layer in swapped) == entry["bytes"]["swapped_per_step"]
        assert sum(layer["bytes"] for layer in resident) == entry["bytes"]["resident"]
        assert (
            sum(layer["bytes"] for layer in entry["layers"]) + entry["bytes"]["fixed"]
            == entry["bytes"]["total"]
        )
        assert entry["bytes"]["pinned"] == attachment.state.pin_budget.used_bytes
        first = entry["layers"][0]
        assert (first["i"], first["name"], first["kind"], first["quant"]) == (
            0,
            "blocks.0.up",
            "Linear",
            "Q4_0",
        )
        assert first["params"] == 512 * 512 + 512
        assert {layer["uses"] for layer in entry["layers"]} == {3}
        memory = snapshot["device_memory"]
        assert memory["weights"] == pytest.approx(sim.memory_allocated(), abs=512 * 30)
        assert memory["total"] == 2048 << 20
        assert memory["weights"] + memory["other"] + memory["free"] == memory["total"]


def test_a_resident_is_not_said_to_be_waited_for_once_it_is_there(sim, virtual_time):
    sim.set_bandwidth(h2d=1e6)
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4))).requires_grad_(False)
    with attached(model, device=GPU, location="shared", budget_bytes=1 << 30), torch.inference_mode():
        for _ in range(3):
            model(torch.ones(2, 256, device=GPU))
        entry = only_model()
        assert entry["bytes"]["swapped_per_step"] == 0
        assert ledger.attachments()[0].layers[0].times.stall_s > 0.1, "they were, when they came"
        assert {layer["stall_us"] for layer in entry["layers"]} == {0}


def test_without_models_a_snapshot_is_empty_and_json():
    snapshot = json.loads(json.dumps(ledger.snapshot()))
    assert snapshot["models"] == []
    assert snapshot["device"] is None
    assert ledger.trace_events() == []


def test_states_follow_what_the_device_has_done_and_not_what_was_asked(sim):
    """One layer after the other: swapped, fetching, ready, in use, swapped."""
    sim.set_async_compute(True)

    class Slow(torch.nn.Linear):
        def forward(self, x):
            sim.busy(0.15)
            return super().forward(x)

    model = torch.nn.Sequential(*(Slow(256, 256) for _ in range(4))).requires_grad_(False)
    layer_bytes = 256 * 256 * 4 + 1024
    ring = 2 * layer_bytes
    sim.set_bandwidth(h2d=layer_bytes / 0.3)  # 300 ms for each: a busy machine sees each state, too
    seen = {str(i): [] for i in range(4)}
    with (
        attached(model, device=GPU, location="shared", budget_bytes=ring, ring_bytes=ring) as attachment,
        torch.inference_mode(),
    ):
        assert set(states().values()) == {"swapped"}
        attachment.run.begin(1)
        x = torch.ones(2, 256).to(GPU)
        model(x)  # only enqueued
        until = time.perf_counter() + 10
        while time.perf_counter() < until:
            now = states()
            for name, state in now.items():
                if not seen[name] or seen[name][-1] != state:
                    seen[name].append(state)
            if set(now.values()) == {"swapped"} and len(seen["3"]) > 1:
                break
            time.sleep(0.002)
        sim.synchronize()
    for name in ("2", "3"):
        assert seen[name][0] in ("swapped", "fetching"), seen
        assert seen[name].index("fetching") < seen[name].index("in_use"), seen
        assert seen[name][-1] == "swapped", seen
    sim.set_async_compute(False)


def test_an_unloaded_model_is_there_and_not_active(sim):
    model = sm.build()
    with attached(model, device=GPU, location="shared", budget_bytes=1 << 30, **F32) as attachment:
        sim.synchronize()
        assert set(states().values()) == {"resident"}
        attachment.unload()
        entry = only_model()
        assert not entry["active"]
        assert {layer["state"] for layer in entry["layers"]} == {"swapped"}
        assert entry["bytes"]["resident"] == 0
        assert ledger.snapshot()["device_memory"]["weights"] == 0


def test_snapshots_from_another_thread_while_models_come_run_and_go(sim, compute_mode, tmp_path):
    problems, count = [], [0]
    stop = threading.Event()

    def look():
        while not stop.is_set():
            try:
                json.dumps(ledger.snapshot(), allow_nan=False)
                json.dumps(ledger.trace_events(), allow_nan=False)
                count[0] += 1
                time.sleep(0.002)  # A thread that never pauses keeps the interpreter lock from the other one.
            except Exception as error:
                problems.append(error)
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        for location in ("shared", "cpu", "disk"):
            model = sm.build(file=tmp_path / f"{location}.gguf")
            expected = sm.reference(model)
            attachment = attach(model, device=GPU, location=location, budget_bytes=0, **F32)
            for budget in (0, 1 << 30, 0):
                attachment.rebalance(budget)
                for _ in range(3):
                    assert torch.equal(sm.run(model, GPU), expected)
            if location == "cpu":
                del model, attachment
            else:
                attachment.detach()
    finally:
        stop.set()
        thread.join(20)
    assert problems == []
    assert count[0] > 5


def test_a_snapshot_of_a_large_model_takes_a_few_milliseconds(sim):
    weight = torch.zeros(128, 256)
    layers = [torch.nn.Linear(256, 128, bias=False, device="meta") for _ in range(300)]
    for layer in layers:
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    model = torch.nn.ModuleList(layers)
    with attached(model, device=GPU, location="shared", budget_bytes=8 << 20) as attachment:
        for layer in attachment.layers[:50]:
            attachment.acquire(layer).release()
        took = []
        for _ in range(20):
            begun = time.perf_counter()
            snapshot = ledger.snapshot()
            took.append(time.perf_counter() - begun)
        assert len(snapshot["models"][0]["layers"]) == 300
        assert min(took) < 0.005


def test_the_trace_has_steps_copies_and_waits_in_microseconds(sim):
    sim.set_bandwidth(h2d=50e6)
    model = sm.build()
    with attached(model, device=GPU, location="shared", budget_bytes=0, **F32) as attachment:
        for _ in range(3):
            sm.run(model, GPU)
        attachment.state.streamer.timeline.collect()
        events = json.loads(json.dumps(ledger.trace_events(), allow_nan=False))
        by_kind = {kind: [e for e in events if e["cat"] == kind] for kind in ("step", "copy", "stall", "use")}
        assert len(by_kind["step"]) == len(attachment.state.streamer.timeline.finished) >= 2
        assert len(by_kind["copy"]) == len(by_kind["step"]) * len(attachment.layers)
        assert by_kind["stall"]
        assert all(event["dur"] >= 0 and event["ts"] >= 0 and event["ph"] == "X" for event in events)
        longest = max(by_kind["copy"], key=lambda event: event["dur"])
        largest = max(layer.payload_bytes for layer in attachment.layers)
        assert longest["dur"] > 0.8 * largest / 50e6 * 1e6
        steps = by_kind["step"]
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1 for a, b in itertools.pairwise(steps))


def test_a_message_is_told_once_and_kept(caplog):
    ledger.message("The sky is falling.", "warning")
    ledger.message("The sky is falling.", "warning")
    ledger.message("It is not.")
    assert [(m["level"], m["text"]) for m in ledger.snapshot()["messages"]] == [
        ("warning", "The sky is falling."),
        ("info", "It is not."),
    ]
    assert [record.message for record in caplog.records if "sky" in record.message] == ["The sky is falling."]


def test_an_answer_to_what_the_user_does_is_logged_each_time_and_kept_once(caplog):
    for text in ("on", "off", "on"):
        ledger.message(f"QSwap is {text}.", "warning", again=True)
    assert [record.message[:-1].split()[-1] for record in caplog.records] == ["on", "off", "on"]
    assert [m["text"] for m in ledger.snapshot()["messages"]] == ["QSwap is off.", "QSwap is on."]


def test_a_message_with_other_numbers_replaces_the_former_and_is_logged_where_they_differ_much(caplog):
    for megabytes in (1000, 990, 1010, 880, 790, 400):
        ledger.message(f"model: {megabytes} MB are too few; the largest layer takes 28.5.", "warning")
    ledger.message("model: 400 MB are enough.")
    texts = [message["text"] for message in ledger.snapshot()["messages"]]
    assert texts == [
        "model: 400 MB are too few; the largest layer takes 28.5.",
        "model: 400 MB are enough.",
    ]
    logged = [record.message.split()[1] for record in caplog.records if "too few" in record.message]
    assert logged == ["1000", "790", "400"]


def test_messages_about_things_with_numbers_in_their_names_are_all_told(caplog):
    texts = ["Q4_K failed.", "Q5_K failed.", "blocks.10 is bad", "blocks.11 is bad", "a\0.gguf", "a1.gguf"]
    for text in texts:
        ledger.message(text, "warning")
    assert [message["text"] for message in ledger.snapshot()["messages"]] == texts
    assert [record.message for record in caplog.records if record.name == "qswap"] == texts


def test_a_model_that_is_left_to_the_host_is_in_the_snapshot_with_the_reason():
    ledger.note_unmanaged("VAE", "it fits")
    try:
        (entry,) = ledger.snapshot()["models"]
        assert (entry["name"], entry["managed"], entry["reason"]) == ("VAE", False, "it fits")
    finally:
        ledger.note_unmanaged("VAE", None)
    assert ledger.snapshot()["models"] == []
    for name in ("VAE", "ControlNet"):
        ledger.note_unmanaged(name, "it fits")
    ledger.forget_unmanaged()
    assert ledger.snapshot()["models"] == []

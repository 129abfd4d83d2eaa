"""The demonstration model, the stand-alone host that runs it, and its page."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib_qswap.quant.gguf_file import GGUFError, open_gguf
from lib_qswap.standalone import demo_file as demo_module
from lib_qswap.standalone.budget import Budget
from lib_qswap.standalone.demo_file import QUANTS, cache_folder, demo_file, layout, make_demo_file
from lib_qswap.standalone.host import Settings, StandaloneHost
from lib_qswap.standalone.measure import DownloadCounter, peak_rss_bytes
from lib_qswap.standalone.worker import Worker

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
TINY = Settings(steps=3, pixels=64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A demo model of 2 + 3 blocks, 7 MB."""
    path = tmp_path_factory.mktemp("demo") / "tiny.gguf"
    make_demo_file(path, "Q4_K", hidden=256, double=2, single=3)
    return path


@pytest.fixture
def host(tiny):
    made = StandaloneHost(tiny, CPU, TINY)
    yield made
    made.close()


@pytest.fixture
def accelerated(tiny, sim, compute_mode):
    """A host on the simulated accelerator."""
    made = StandaloneHost(tiny, torch.device("simgpu"), TINY)
    yield made
    made.close()


# ------------------------------------------------------------------------------------------ the demo file


@pytest.mark.parametrize("quant", QUANTS)
def test_another_reader_finds_weights_of_the_promised_spread(tmp_path, quant):
    gguf = pytest.importorskip("gguf")
    make_demo_file(tmp_path / "model.gguf", quant, hidden=256, double=1, single=1)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name in ("double_blocks.0.img_mlp.2.weight", "single_blocks.0.linear1.weight"):
        tensor = tensors[name]
        assert tensor.tensor_type.name == quant
        rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        assert np.isfinite(rows).all()
        std = 1 / math.sqrt(rows.shape[1])
        assert rows.std() == pytest.approx(std, rel=0.1)
        # Q4_0 counts from -8 to 7: its mean is half a step, a ninth of its spread, below 0.
        assert abs(rows.mean()) < 0.15 * std


def test_the_demo_model_has_the_depth_of_flux_and_its_304_block_layers_at_four_bits():
    tensors = layout("Q4_K", hidden=768, double=19, single=38)
    blocks = [tensor for tensor in tensors if tensor.format_name == "Q4_K"]
    assert len(blocks) == 304
    # (19 * 36 + 38 * 15) * 768**2 weights at 4.5 bits.
    assert sum(tensor.nbytes for tensor in blocks) == (19 * 36 + 38 * 15) * 768**2 * 144 // 256
    assert 0.4e9 < sum(tensor.nbytes for tensor in tensors) < 0.45e9


def test_our_reader_opens_the_file_and_finds_every_byte_used(tiny):
    file = open_gguf(tiny)
    assert file.metadata["general.architecture"] == "flux"
    last = max(file.tensors, key=lambda tensor: tensor.offset)
    assert tiny.stat().st_size == -(-(last.offset + last.nbytes) // 32) * 32
    assert file["single_blocks.2.linear1.weight"].shape == (7 * 256, 256)


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    def made(name: str, seed: int) -> bytes:
        make_demo_file(tmp_path / name, "Q6_K", hidden=256, double=1, single=1, seed=seed)
        return (tmp_path / name).read_bytes()

    assert made("a", 7) == made("b", 7)
    assert made("a", 7) != made("c", 8)


def test_a_file_that_was_not_finished_is_never_seen(tmp_path):
    def interrupt(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_demo_file(tmp_path / "model.gguf", "Q4_0", hidden=256, double=1, single=1, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 300 << 20})
    monkeypatch.setattr(demo_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"needs 434 MB and .* has 315 MB left.*QSWAP_CACHE"):
        make_demo_file(tmp_path / "model.gguf", "Q4_K")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"quant": "Q9_K"}, {"hidden": 100}, {"hidden": 0}])
def test_a_demo_model_that_cannot_be_made_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"must be a multiple|choose one of"):
        make_demo_file(tmp_path / "model.gguf", **{"quant": "Q4_K", **wrong})


def test_the_demo_model_is_made_once(tmp_path):
    calls: list[float] = []
    first = demo_file("Q2_K", hidden=256, folder=tmp_path, on_progress=calls.append)
    assert calls == sorted(calls)
    assert calls[-1] == 1
    made = len(calls)
    assert demo_file("Q2_K", hidden=256, folder=tmp_path, on_progress=calls.append) == first
    assert len(calls) == made


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("QSWAP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        monkeypatch.setenv("QSWAP_CACHE", "")
        assert cache_folder() == tmp_path / "other" / "qswap"
        monkeypatch.delenv("QSWAP_CACHE")
        assert cache_folder() == tmp_path / "other" / "qswap"


# ----------------------------------------------------------------------------------------------- the host


def test_every_location_and_budget_gives_the_same_bits(host):
    hashes, swapped, homes = set(), [], []
    for location in ("auto", "gpu", "shared", "cpu", "disk"):
        for budget in (None, Budget(share=1.2), Budget(nbytes=0)):
            # With a ring of its own choice the planner may find that it does without residents.
            host.use(replace(TINY, location=location, budget=budget, ring_bytes=1 << 20))
            host._attachment.idle.kept.clear()  # All layers are to travel.
            denoised, summary = host.generate()
            assert denoised.latent.isfinite().all()
            assert denoised.latent.std() > 0.1
            hashes.add(summary.output_sha256)
            swapped.append(summary.h2d_bytes_per_step)
            homes.append((location, budget, summary.homes))
    assert len(hashes) == 1
    # All resident, some, none: or else the comparison compared nothing.
    assert swapped[0] == 0 < swapped[1] < swapped[2]
    assert dict(homes[-1][2]) == {"disk": 33}
    assert dict(homes[-4][2]) == {"cpu": 33}


@pytest.mark.simgpu
def test_every_location_and_budget_gives_the_same_bits_on_an_accelerator(accelerated, sim):
    host = accelerated
    hashes, homes = {host.generate()[1].output_sha256}, set()
    for location in ("shared", "cpu", "disk"):
        for budget in (Budget(share=0.85), Budget(nbytes=0)):
            host.use(replace(TINY, location=location, budget=budget))
            _, summary = host.generate()
            hashes.add(summary.output_sha256)
            homes.update(summary.homes)
            assert summary.h2d_bytes_per_step > 0
            assert summary.device_weight_bytes_peak <= summary.budget_bytes
            assert summary.d2h_bytes == 0
    assert len(hashes) == 1
    assert homes == {"shared", "cpu", "disk"}
    sim.reset_stats()
    assert host.unload() == 0
    assert sim.stats()["d2h_pinned_bytes"] == sim.stats()["d2h_pageable_bytes"] == 0
    assert host.snapshot()["device_memory"]["weights"] == 0


@pytest.mark.simgpu
def test_the_arithmetic_of_forge_gives_other_bits_and_about_the_same_latent(accelerated):
    exact, _ = accelerated.generate()
    accelerated.use(replace(TINY, arithmetic="like Forge"))
    rounded, _ = accelerated.generate()
    assert rounded.sha256 != exact.sha256
    difference = (rounded.latent - exact.latent).std() / exact.latent.std()
    assert difference < 0.05


def test_the_summary_adds_up(host):
    _, whole = host.generate()
    packed = host.packed_bytes
    assert len(whole.step_seconds) == whole.steps == TINY.steps
    assert sum(whole.step_seconds) >= whole.compute_seconds + whole.stall_seconds > 0
    assert whole.layers == sum(whole.homes.values()) == 33
    assert whole.h2d_bytes_per_step == 0
    # Payloads are a little larger than the tensors (alignment), biases in fp32 as in the file.
    assert packed < whole.device_weight_bytes_peak < 2 * packed
    assert packed < whole.peak_rss_bytes
    host.use(replace(TINY, budget=Budget(nbytes=0)))
    _, least = host.generate()
    assert packed * 0.9 < least.h2d_bytes_per_step < packed * 1.1
    assert least.device_weight_bytes_peak <= least.budget_bytes < whole.device_weight_bytes_peak
    assert set(json.loads(json.dumps(least.as_dict()))) == {
        *("output_sha256", "steps", "step_seconds", "compute_seconds", "stall_seconds", "location", "homes"),
        *("budget_bytes", "device_weight_bytes_peak", "pinned_bytes", "h2d_bytes_per_step", "d2h_bytes"),
        *("peak_rss_bytes", "layers"),
    }


def test_settings_that_cannot_be_had_leave_the_page_as_it_was(host, monkeypatch):
    _, before = host.generate()
    attach, failures = host._attach, [ValueError("the file is damaged")]

    def fails_once():
        if failures:
            raise failures.pop()
        attach()

    monkeypatch.setattr(host, "_attach", fails_once)
    settings = host.settings
    with pytest.raises(ValueError, match="damaged"):
        host.use(replace(settings, location="disk" if settings.location != "disk" else "cpu"))
    assert host.settings == settings
    _, after = host.generate()
    assert after.output_sha256 == before.output_sha256


def test_unloading_leaves_no_weights_on_the_device_and_the_next_generation_brings_them_back(host):
    _, before = host.generate()
    assert host.unload() == 0
    assert host.snapshot()["device_memory"]["weights"] == 0
    _, after = host.generate()
    assert after.output_sha256 == before.output_sha256


def test_a_generation_that_is_stopped_leaves_the_host_usable(host):
    def stop(done: int) -> None:
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        host.generate(stop)
    _, summary = host.generate()
    assert len(summary.step_seconds) == TINY.steps


def test_a_file_that_changed_since_it_was_opened_is_not_computed_with(tmp_path):
    path = tmp_path / "model.gguf"
    make_demo_file(path, "Q8_0", hidden=256, double=1, single=1)
    host = StandaloneHost(path, CPU, TINY)
    os.utime(path, ns=(1, 1))
    with pytest.raises(GGUFError, match=r"model\.gguf"):
        host.generate()
    host.close()


def test_a_file_that_shrinks_during_a_generation_ends_it_and_the_next_one_says_so_too(tmp_path):
    path = tmp_path / "model.gguf"
    make_demo_file(path, "Q8_0", hidden=256, double=1, single=1)
    whole = path.read_bytes()
    host = StandaloneHost(path, CPU, replace(TINY, location="disk", budget=Budget.parse("1")))
    worker = Worker(host)
    steps = []

    def shrink(done: int) -> None:
        steps.append(done)
        os.truncate(path, 4096)

    with pytest.raises((GGUFError, OSError), match=r"model\.gguf"):
        host.generate(shrink)
    assert steps == [1]
    assert worker.start(host.settings)
    worker.stop()
    assert worker.status.text.startswith("Failed: ")
    assert "model.gguf" in worker.status.text
    assert not worker.status.running
    assert host.snapshot()["models"]

    path.write_bytes(whole)
    with pytest.raises(GGUFError, match="load the model again"):
        host.generate()
    host.close()
    reopened = StandaloneHost(path, CPU, TINY)
    assert len(reopened.generate()[1].step_seconds) == TINY.steps
    reopened.close()


def test_a_budget_is_a_share_of_the_model_or_bytes_in_the_units_of_forge():
    assert Budget.parse("25%").of(1000) == 250
    assert Budget.parse("512MB").of(1000) == 512 << 20
    assert Budget.parse("1.5 GiB").of(1000) == 3 << 29
    assert Budget.parse("2g").of(1000) == 2 << 30
    assert Budget.parse("4096").of(1000) == 4096
    for wrong in ("", "x", "-5%", "5 percent", "5TB", "%", "nan", "1e9"):
        with pytest.raises(ValueError, match="is no budget"):
            Budget.parse(wrong)


# ------------------------------------------------------------------------------------------ for the panel


def test_the_panel_can_change_location_and_budget(host):
    _, before = host.generate()
    answer = host.apply({"qswap_location": "Disk", "qswap_gpu_budget_mb": 1})
    assert answer["applied"] == {"qswap_location": "Disk", "qswap_gpu_budget_mb": 1}
    assert host.snapshot()["location"] == "disk"
    _, after = host.generate()
    assert after.h2d_bytes_per_step > before.h2d_bytes_per_step
    host.apply({"qswap_gpu_budget_mb": 0})
    _, automatic = host.generate()
    assert automatic.h2d_bytes_per_step == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"qswap_location": "Moon"},
        {"qswap_location": 3},
        {"qswap_gpu_budget_mb": -1},
        {"qswap_gpu_budget_mb": "1"},
        {"qswap_keep_outputs": "no"},
        {"qswap_ring_mb": True},
        {"qswap_colour": "red"},
    ],
)
def test_a_setting_that_cannot_be_is_named_and_nothing_is_applied(host, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        host.apply({"qswap_arithmetic": "like Forge", **wrong})
    assert host.settings == TINY


def test_the_panel_can_ask_what_another_budget_would_do(host):
    everything = host.plan({"budget_bytes": 1 << 40})
    nothing = host.plan({"budget_bytes": 0})
    assert len(everything["resident"]) == 33
    assert everything["ring_bytes"] == 0
    assert len(nothing["resident"]) < 33
    assert nothing["ring_bytes"] > 0
    assert nothing["step_s"] >= nothing["bound_s"] >= everything["bound_s"] > 0
    with pytest.raises(ValueError, match="budget_bytes"):
        host.plan({"budget_bytes": None})


# ------------------------------------------------------------------------------------------------ the page


def wait_until(holds, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def test_a_worker_runs_one_generation_at_a_time(host):
    worker = Worker(host)
    with host._lock:  # As if another change of settings took its time.
        assert worker.start(host.settings)
        assert not worker.start(host.settings)
        assert worker.status.running
    wait_until(lambda: not worker.status.running)
    assert worker.status.finished == 1
    assert worker.status.share == 1
    assert worker.status.result is not None
    assert worker.start(replace(host.settings, seed=1))
    wait_until(lambda: worker.status.finished == 2)
    assert host.settings.seed == 1


def test_a_worker_that_is_stopped_ends_after_the_step(host):
    worker = Worker(host)
    assert worker.start(replace(host.settings, steps=100_000))
    wait_until(lambda: worker.status.share > 0)
    worker.stop()
    assert worker.status.text == "Stopped."
    assert not worker.status.running
    assert not worker.start(host.settings)


def test_a_worker_says_why_a_generation_failed(tmp_path):
    path = tmp_path / "model.gguf"
    make_demo_file(path, "Q8_0", hidden=256, double=1, single=1)
    host = StandaloneHost(path, CPU, TINY)
    os.utime(path, ns=(1, 1))
    worker = Worker(host)
    worker.start(host.settings)
    wait_until(lambda: not worker.status.running)
    assert worker.status.text.startswith("Failed: ")
    assert "model.gguf" in worker.status.text
    host.close()


def test_the_page_holds_the_panel_and_its_routes_answer(host):
    pytest.importorskip("gradio", minversion="6")
    from fastapi.testclient import TestClient

    from lib_qswap.standalone.app import make_app

    client = TestClient(make_app(host, Worker(host)))
    page = client.get("/").text
    assert "qswap-panel" in page
    (model,) = client.get("/qswap/v1/residency").json()["models"]
    assert len(model["layers"]) == 33
    applied = client.post("/qswap/v1/settings", json={"qswap_location": "CPU"})
    assert applied.json()["applied"] == {"qswap_location": "CPU"}
    assert {layer["home"] for layer in host.snapshot()["models"][-1]["layers"]} == {"cpu"}


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process on Windows")
def test_the_page_is_served_until_ctrl_c(tiny):
    pytest.importorskip("gradio", minversion="6")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "lib_qswap",
        "run",
        str(tiny),
        "--port",
        str(port),
        "--size",
        "64",
        "--json",
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        assert process.stdout is not None
        killer = threading.Timer(120, process.kill)
        killer.start()
        url = json.loads(process.stdout.readline())["url"]
        with urllib.request.urlopen(f"{url}qswap/v1/residency", timeout=60) as answer:
            assert json.load(answer)["device"] == "cpu"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
        killer.cancel()
        assert "Traceback" not in process.stderr.read()


# ----------------------------------------------------------------------------------------------- measuring


@pytest.mark.simgpu
def test_bytes_that_come_down_from_a_device_are_counted(sim):
    device = torch.device("simgpu")
    tensor = torch.ones(1000, device=device)
    with DownloadCounter() as counter:
        tensor.cpu()
        torch.empty(1000).copy_(tensor)
        torch.ones(1000).to(device)
        tensor.clone()
    assert counter.nbytes == 2 * 4000


def test_the_peak_of_ram_rises_with_what_is_touched():
    before = peak_rss_bytes()
    block = np.ones(before + (64 << 20), dtype=np.uint8)
    assert peak_rss_bytes() > before + (32 << 20)
    del block

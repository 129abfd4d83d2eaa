"""What step_times.py measures beside QSwap: other programs, Forge, and a link slower than the device's."""

from __future__ import annotations

import itertools
import os
import sys
import types
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
BENCHMARKS = TESTS.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
import step_forge  # noqa: E402
import step_peers  # noqa: E402
import step_rigs  # noqa: E402
import step_runner  # noqa: E402

from lib_qswap.standalone.demo_file import make_demo_file  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("peers") / "tiny.gguf"
    make_demo_file(path, "Q4_K", hidden=256, double=1, single=2)
    return path


@pytest.fixture
def runner(tiny):
    runner = step_runner.Runner(step_rigs.make_rig("cpu", tiny, [16], "real"), steps=1)
    assert runner.all_resident()["step_s"] == runner.compute_s > 0
    return runner


# ------------------------------------------------------------------------------------------ other programs
class Mmgp(types.ModuleType):
    """Stands for the package: says how it was called, and that it was asked to give back what it holds."""

    def __init__(self, works: bool) -> None:
        super().__init__("mmgp")
        self.offload, self.works, self.released = self, works, 0
        self.__spec__ = types.SimpleNamespace(name="mmgp")

    def profile(self, models, number, **options):
        torch.set_default_device("meta")
        if not self.works:
            raise AssertionError("no CUDA here\nand more")
        self.models, self.number, self.options = models, number, options
        return self

    def release(self) -> None:
        self.released += 1


@pytest.fixture(params=[True, False], ids=["works", "fails"])
def mmgp(request, monkeypatch):
    module = Mmgp(request.param)
    monkeypatch.setitem(sys.modules, "mmgp", module)
    return module


def test_mmgp_is_offered_on_cuda_where_it_is_installed(mmgp, monkeypatch):
    assert "mmgp" in step_peers.find_peers(torch.device("cuda"))
    for other in ("cpu", "xpu"):
        assert "mmgp" not in step_peers.find_peers(torch.device(other))
    monkeypatch.setitem(sys.modules, "mmgp", None)
    monkeypatch.setattr(step_peers.importlib.util, "find_spec", lambda name: None)
    assert "mmgp" not in step_peers.find_peers(torch.device("cuda"))


def test_mmgp_gets_the_packed_model_and_leaves_nothing_behind(mmgp, runner):
    row = runner.peer("mmgp", step_peers._mmgp)
    assert torch.empty(0).device == CPU
    if mmgp.works:
        (model,) = mmgp.models.values()
        assert all(module._lock_dtype for module in model.modules())
        assert mmgp.options == {"quantizeTransformer": False}
        assert row["step_s"] > 0
        assert row["same_output"]
    else:
        assert row["error"] == "AssertionError: no CUDA here"
        assert "step_s" not in row
    assert mmgp.released == mmgp.works


def test_a_program_that_fails_in_the_middle_of_a_step_is_a_row_too(runner):
    def peer(model, device):
        model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("big")))

    assert runner.peer("greedy", peer)["error"] == "out of device memory"
    assert runner.qswap("cpu", (0.25,))[0]["step_s"] > 0


def test_the_dense_model_is_timed_beside_the_packed_one(runner):
    row = runner.dense()
    assert row["system"] == "dense float32"
    assert row["packed_over_dense"] == pytest.approx(runner.compute_s / row["step_s"])


# ---------------------------------------------------------------------------------------------- slower links
MB = 1 << 20


@pytest.fixture
def link(sim, virtual_time):
    """A device with a link of 1 GB/s, half of it from pageable memory."""
    with sim.settings(h2d=1e9, pageable=0.5e9, latency=0, async_compute=True):
        yield step_rigs.device_of(torch.device("simgpu"))


def seconds_of(device, work) -> float:
    stream = device.current_stream()
    first, last = (device.new_event(timing=True) for _ in range(2))
    first.record(stream)
    kept = work()  # Until its copy has arrived.
    last.record(stream)
    device.synchronize()
    del kept
    return first.elapsed_time(last) * 1e-3


@pytest.mark.simgpu
@pytest.mark.parametrize("wanted", [0.25e9, 0.3e9, 1e9, 4e9])
def test_copies_have_the_bandwidth_that_is_wanted_and_no_more_than_the_link_has(link, wanted):
    source = torch.arange(20 * MB, dtype=torch.int32).view(torch.uint8)[: 10 * MB].contiguous()
    pinned, target = source.pin_memory(), torch.empty(10 * MB, dtype=torch.uint8, device=link.device)
    took = 10 * MB / min(wanted, 1e9)
    with step_rigs.Throttle(link, 1e9, wanted):
        measured = seconds_of(link, lambda: target.copy_(pinned, non_blocking=True))
        assert measured == pytest.approx(took, rel=1e-3)
        assert torch.equal(target.cpu(), source)
        assert seconds_of(link, lambda: pinned.to(link.device)) == pytest.approx(took, rel=1e-3)
        # From pageable memory the staging comes in addition, as on the link itself.
        pageable = seconds_of(link, lambda: target.copy_(source))
        assert pageable == pytest.approx(took + 10 * MB / 1e9, rel=1e-3)
        # As modules and other programs write it.
        for arguments in ((link.device, None, True), (link.device, torch.uint8), ("simgpu",)):
            assert seconds_of(link, lambda to=arguments: pinned.to(*to)) == pytest.approx(took, rel=1e-3)
        for to in (lambda: pinned.to(link.device, copy=True), lambda: pinned.to("simgpu", None, False, True)):
            assert seconds_of(link, to) == pytest.approx(took, rel=1e-3)
    assert "copy_" not in vars(torch.Tensor)
    free = seconds_of(link, lambda: target.copy_(pinned, non_blocking=True))
    assert free == pytest.approx(10 * MB / 1e9, rel=1e-3)


@pytest.mark.simgpu
def test_two_streams_share_the_slower_link_and_compute_runs_beside_it(link, sim):
    pinned = torch.ones(10 * MB, dtype=torch.uint8).pin_memory()
    targets = [torch.empty(10 * MB, dtype=torch.uint8, device=link.device) for _ in range(2)]
    streams = [link.new_stream() for _ in range(2)]
    link.synchronize()

    def work() -> None:
        for stream, target in zip(streams, targets, strict=True):
            link.order(link.current_stream(), stream)
            with link.on_stream(stream):
                target.copy_(pinned, non_blocking=True)
        sim.busy(0.05)
        for stream in streams:
            link.order(stream, link.current_stream())

    with step_rigs.Throttle(link, 1e9, 0.25e9):
        assert seconds_of(link, work) == pytest.approx(2 * 10 * MB / 0.25e9, rel=1e-2)


@pytest.mark.simgpu
def test_what_is_copied_on_the_device_or_back_is_as_fast_as_ever(link):
    here = torch.ones(10 * MB, dtype=torch.uint8, device=link.device)
    there, host = torch.empty_like(here), torch.empty(10 * MB, dtype=torch.uint8).pin_memory()

    def work() -> None:
        there.copy_(here)
        host.copy_(there, non_blocking=True)

    plain = seconds_of(link, work)
    with step_rigs.Throttle(link, 1e9, 0.1e9):
        assert seconds_of(link, work) == plain


@pytest.mark.simgpu
def test_a_rig_that_stands_for_a_card_has_its_memory_and_link_for_that_time(sim, tiny, monkeypatch):
    monkeypatch.setattr(step_rigs, "LINK_PROBE_BYTES", 10 * MB)
    rig = step_rigs.ComputingRig(torch.device("simgpu"), tiny, [16])
    limits = []
    monkeypatch.setattr(rig, "limit_memory", limits.append)
    card = step_rigs.Card(6_000_000_000, 0.5e9)
    assert card.label == "stands for a card of 6 GB: memory capped, link throttled to 0.5 GB/s"
    own = rig.link_bytes_per_s()
    assert own == pytest.approx(2e9, rel=0.25)
    with rig.standing_for(card):
        assert limits == [6_000_000_000]
        assert rig.link_bytes_per_s() == pytest.approx(0.5e9, rel=0.25)
    assert limits == [6_000_000_000, None]
    assert rig.link_bytes_per_s() == own


# --------------------------------------------------------------------------------------------------- Forge
JOB = {"device": "simgpu", "sides": [16], "clock": "virtual", "steps": 2, "case": 4.0, "compute_s": 1.0}


def test_a_folder_that_is_no_forge_gives_a_row_that_says_so(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("FORGE_PYTHON", sys.executable)
    job = JOB | {"file": str(tiny), "device": "cpu", "card": None, "shares": [0.25]}
    (row,) = step_forge.forge_rows(tmp_path, job, 100)
    assert row["system"] == "Forge"
    assert "No module named 'backend'" in row["error"]


def test_forges_interpreter_is_that_of_its_venv(tmp_path, monkeypatch):
    monkeypatch.delenv("FORGE_PYTHON", raising=False)
    assert step_forge.interpreter(tmp_path) == Path(sys.executable)
    own = tmp_path / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    own.parent.mkdir(parents=True)
    own.touch()
    assert step_forge.interpreter(tmp_path) == own
    monkeypatch.setenv("FORGE_PYTHON", "/other/python")
    assert step_forge.interpreter(tmp_path) == Path("/other/python")


@pytest.fixture(scope="module")
def full_depth(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("full") / "demo.gguf"
    make_demo_file(path, "Q4_K", hidden=256)
    return path


def check_forge_rows(rows) -> None:
    """Every method at every budget, with the same output and times near what its bytes take at least."""
    methods = [f"Forge {method} {place}" for place in ("CPU", "Shared") for method in ("Queue", "Async")]
    shares = [0.25, 0.75, 1.0]
    assert [(row["system"], row["budget_share"]) for row in rows] == list(itertools.product(methods, shares))
    for row in rows:
        assert row["same_output"], row
        assert row["resident_share"] == pytest.approx(
            1 - row["swapped_bytes_per_step"] / row["model_bytes"], abs=1e-9
        )
        assert row["resident_share"] <= row["budget_share"]
        assert row["ratio"] >= 0.999
        for name in ("peak_device_bytes", "page_locked_bytes", "rss_bytes"):
            assert row[name] is not None
    for few, more, whole in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert few["step_s"] > more["step_s"] > whole["step_s"] == pytest.approx(1, rel=1e-3)
        assert few["peak_device_bytes"] < whole["peak_device_bytes"]
        assert whole["swapped_bytes_per_step"] == 0


def forge_job(file: Path, **changes) -> dict:
    return JOB | {"file": str(file), "card": None, "shares": [0.25, 0.75, 1.0]} | changes


@pytest.mark.simgpu
def test_a_forge_folder_is_measured_with_every_method_at_every_budget(simgpu, full_depth, monkeypatch):
    monkeypatch.setenv("FORGE_PYTHON", sys.executable)
    rows = step_forge.forge_rows(TESTS / "forge_swap", forge_job(full_depth), 300)
    check_forge_rows(rows)
    shared = rows[6]
    assert shared["page_locked_bytes"] >= shared["swapped_bytes_per_step"] > rows[0]["page_locked_bytes"] == 0


@pytest.mark.simgpu
def test_forge_gets_the_card_that_the_others_get(simgpu, full_depth, monkeypatch):
    monkeypatch.setenv("FORGE_PYTHON", sys.executable)
    size = full_depth.stat().st_size
    job = forge_job(full_depth, card=[size // 4, size * 2.0], shares=[0.1, 1.0])
    rows = step_forge.forge_rows(TESTS / "forge_swap", job, 300)
    fitting, too_much = rows[:2]
    assert fitting["bound_s"] == pytest.approx(1)
    assert too_much["error"] == "out of device memory"


@pytest.mark.simgpu
@pytest.mark.skipif("FORGE" not in os.environ, reason="FORGE names no folder of the real web UI")
def test_the_real_forge_is_measured_with_every_method_at_every_budget(simgpu, full_depth):
    check_forge_rows(step_forge.forge_rows(Path(os.environ["FORGE"]), forge_job(full_depth), 300))

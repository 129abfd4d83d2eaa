"""The `qswap` command, and what `import lib_qswap` costs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import lib_qswap
from lib_qswap import cli
from lib_qswap.quant.formats import FORMATS
from lib_qswap.standalone import bench, bench_dequant, bench_step, demo_file
from lib_qswap.standalone.budget import Budget
from lib_qswap.standalone.host import Settings, StandaloneHost
from lib_qswap.standalone.measure import rss_bytes
from lib_qswap.swap import home
from lib_qswap.swap.copier import STAGING_BUFFER_BYTES, staging_buffers

ROOT = Path(__file__).resolve().parents[1]
SUMMARY_KEYS = {
    *("output_sha256", "steps", "step_seconds", "compute_seconds", "stall_seconds", "location", "homes"),
    *("budget_bytes", "device_weight_bytes_peak", "pinned_bytes", "h2d_bytes_per_step", "d2h_bytes"),
    *("peak_rss_bytes", "layers", "messages"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.gguf"
    demo_file.make_demo_file(path, "Q4_K", hidden=256, double=1, single=2)
    return path


@pytest.fixture
def tiny_demo(tiny, monkeypatch):
    """`qswap demo` and `qswap bench` take the tiny model for the demo's."""
    for module in (demo_file, bench):
        monkeypatch.setattr(module, "demo_file", lambda quant, **_: tiny)


def qswap(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `qswap ARGUMENTS`."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


# ---------------------------------------------------------------------------------------------- the package


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, lib_qswap, lib_qswap.cli; print(sorted({'torch', 'numpy', 'gradio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_those_of_the_parts():
    from lib_qswap.quant.gguf_file import GGUFError, open_gguf
    from lib_qswap.quant.packed import PackedTensor
    from lib_qswap.swap.manager import attach

    assert lib_qswap.open_gguf is open_gguf
    assert lib_qswap.GGUFError is GGUFError
    assert lib_qswap.PackedTensor is PackedTensor
    assert lib_qswap.attach is attach
    assert set(lib_qswap.__all__) <= set(dir(lib_qswap))
    with pytest.raises(AttributeError, match="no attribute 'attatch'"):
        lib_qswap.attatch  # noqa: B018


def test_the_version_is_that_of_the_project():
    assert f'\nversion = "{lib_qswap.__version__}"\n' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_the_folder_runs_as_the_module_does_where_python_does_not_look_into_the_current_folder():
    # As with a ._pth file: isolated, and without the packages of this environment, QSwap among them.
    command = [sys.executable, "-I", "-S", "lib_qswap", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (f"qswap {lib_qswap.__version__}", "")


def test_the_names_that_the_command_offers_are_those_of_the_parts():
    assert cli.DEMO_QUANTS == demo_file.QUANTS
    assert cli.LOCATIONS == home.LOCATIONS
    assert set(cli.BENCHMARKS) == {*bench.BENCHMARKS, "all"}


# --------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["run"], "file"),
        (["run", "TINY", "--headless", "--location", "moon"], "moon"),
        (["run", "TINY", "--headless", "--budget", "much"], "'much' is no budget"),
        (["run", "TINY", "--headless", "--steps", "0"], "--steps: '0' is no whole number"),
        (["run", "TINY", "--headless", "--size", "100"], "size must be a multiple of 16"),
        (["run", "TINY", "--headless", "--device", "toaster"], "device toaster cannot be used"),
        (["run", "TINY", "--headless", "--device", "meta"], "device meta cannot be used"),
        (["run", "TINY", "--port", "70000"], "ports end at 65535"),
        (["run", "MISSING.gguf", "--headless"], "MISSING.gguf"),
        (["run", "NOT_GGUF", "--headless"], "not a GGUF file"),
        (["run", "NOT_FLUX", "--headless"], "no tensor img_in.weight"),
        (["inspect", "NOT_GGUF"], "not a GGUF file"),
        (["inspect", ""], "file: the name is empty"),
        (["run", "", "--headless"], "file: the name is empty"),
        (["demo", "--headless", "--quant", "Q4_Z"], "Q4_Z"),
        (["plan", "--profile", "MISSING.json", "--budget", "50%"], "MISSING.json: No such file"),
        (["plan", "--profile", "NOT_GGUF", "--budget", "50%"], "not JSON"),
        (["bench", "dequant", "--types", "Q4_K,Q4_Z"], "'Q4_Z' is no type of blocks: Q4_0, "),
        (["bench", "dequant", "--comfyui-gguf", "MISSING"], "MISSING is no checkout of ComfyUI-GGUF"),
        (["bench", "dequant", "--ggml", "NOT_GGUF"], "NOT_GGUF cannot be loaded"),
        (["doctor", "--webui", "MISSING"], "MISSING is not the folder"),
    ],
)
def test_what_the_user_can_get_wrong_is_one_line_and_exit_code_2(
    arguments, complaint, tiny, tmp_path, capsys
):
    (tmp_path / "NOT_GGUF").write_bytes(b"PK\x03\x04 and so on")
    from gguf_writer import Tensor, gguf_bytes

    (tmp_path / "NOT_FLUX").write_bytes(gguf_bytes([Tensor("blk.0.attn_q.weight")]))
    paths = {"TINY": tiny}
    for name in ("NOT_GGUF", "NOT_FLUX", "MISSING", "MISSING.gguf", "MISSING.json"):
        paths[name] = tmp_path / name
    code, out, err = qswap(capsys, *(paths.get(argument, argument) for argument in arguments))
    assert code == 2
    assert out == ""
    assert complaint in err
    assert err.count("\n") == 1
    assert err.endswith("\n")


def test_a_device_that_is_not_there_is_said_before_the_demo_model_is_made(monkeypatch, capsys):
    monkeypatch.setattr(demo_file, "demo_file", lambda *_, **__: pytest.fail("the file was made first"))
    code, out, err = qswap(capsys, "demo", "--headless", "--device", "toaster")
    assert (code, out) == (2, "")
    assert "device toaster cannot be used" in err


def test_ctrl_c_while_torch_is_imported_ends_in_a_word(monkeypatch, capsys):
    class Interrupted(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            if name == "OutOfMemoryError":
                raise KeyboardInterrupt
            raise AttributeError(name)

    monkeypatch.setitem(sys.modules, "torch.cuda", Interrupted("torch.cuda"))
    try:
        code = cli.main(["doctor"])
    except KeyboardInterrupt:
        pytest.fail("a traceback is shown")
    assert code == 130
    assert capsys.readouterr() == ("", "stopped\n")


@pytest.mark.simgpu
def test_a_device_without_room_for_a_single_layer_is_one_line_and_exit_code_2(tiny, sim, capsys):
    sim.set_total(1 << 20)
    code, out, err = qswap(capsys, "run", tiny, "--headless", "--device", "simgpu", "--budget", "0")
    assert (code, out) == (2, "")
    assert "no room even for the smallest budget" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_name_in_a_file_cannot_steer_the_terminal(tmp_path, capsys):
    from gguf_writer import Tensor, gguf_bytes

    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([Tensor("weight")], {"general.name": "clear\x1b[2Jscreen"}))
    code, out, _ = qswap(capsys, "inspect", path)
    assert code == 0
    assert "screen" in out
    assert "\x1b" not in out


def test_every_argument_of_every_command_is_explained():
    (commands,) = (a.choices for a in cli.build_parser()._actions if isinstance(a.choices, dict))
    silent = [
        f"{name} {action.dest}"
        for name, parser in commands.items()
        for action in parser._actions
        if not action.help
    ]
    assert silent == []


# ------------------------------------------------------------------------------------------------- commands


def test_run_prints_the_summary_as_json(tiny, capsys):
    code, out, err = qswap(capsys, "run", tiny, "--headless", "--json", "--steps", "2", "--size", "64")
    summary = json.loads(out)
    assert code == 0
    assert set(summary) == SUMMARY_KEYS
    assert summary["steps"] == len(summary["step_seconds"]) == 2
    assert summary["layers"] == sum(summary["homes"].values())
    assert len(summary["output_sha256"]) == 64
    assert "denoising 100%" in err


def test_the_output_depends_on_the_seed_and_not_on_where_the_weights_are(tiny, capsys):
    def sha256(*options: str) -> str:
        _, out, _ = qswap(
            capsys, "run", tiny, "--headless", "--json", "--steps", "1", "--size", "64", *options
        )
        return json.loads(out)["output_sha256"]

    first = sha256("--location", "disk", "--budget", "0")
    assert sha256("--location", "CPU", "--budget", "90%") == first
    assert sha256("--seed", "1") != first


def test_a_budget_that_is_too_small_is_raised_and_said(tiny, capsys):
    command = ("run", tiny, "--headless", "--steps", "1", "--size", "64", "--budget", "1MB")
    said = "tiny: 1 MB of device memory are too few; "
    _, out, _ = qswap(capsys, *command)
    assert out.splitlines()[-1].startswith(f"note: {said}")
    _, out, _ = qswap(capsys, *command, "--json")
    newest = json.loads(out)["messages"][-1]
    assert newest["level"] == "info"
    assert newest["text"].startswith(said)


def test_demo_prints_the_summary_and_where_every_layer_is(tiny_demo, capsys):
    code, out, _ = qswap(capsys, "demo", "--headless", "--steps", "1", "--size", "64", "--location", "disk")
    assert code == 0
    assert "homes of 22 layers: 22 disk" in out
    assert "single_blocks.1.linear1" in out
    assert "sha256" in out


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
def test_a_reader_that_has_seen_enough_is_no_error(tiny):
    command = [sys.executable, "-m", "lib_qswap", "inspect", str(tiny), "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0


def test_inspect_lists_every_tensor(tiny, capsys):
    code, out, _ = qswap(capsys, "inspect", tiny, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["packed_bytes"] == sum(tensor["bytes"] for tensor in report["tensors"])
    linear1 = next(
        tensor for tensor in report["tensors"] if tensor["name"] == "single_blocks.1.linear1.weight"
    )
    assert (linear1["type"], linear1["shape"]) == ("Q4_K", [1792, 256])
    assert report["problems"] == []
    assert str(tiny) in qswap(capsys, "inspect", tiny)[1]


def profile(path: Path, **changes: object) -> Path:
    """Four layers of 1 MB and 1 s, over 1 MB/s."""
    layers = [{"name": f"layer{i}", "bytes": 1_000_000, "compute_s": 1.0} for i in range(4)]
    path.write_text(json.dumps({"link_bytes_per_s": 1e6, "layers": layers, **changes}))
    return path


def test_plan_answers_with_residents_ring_and_step_time(tmp_path, capsys):
    path = profile(tmp_path / "profile.json")
    code, out, _ = qswap(capsys, "plan", "--profile", path, "--budget", "100%", "--json")
    # All four fit: the step is their 4 s of compute.
    assert code == 0
    assert json.loads(out) == {
        "resident": ["layer0", "layer1", "layer2", "layer3"],
        "ring_bytes": 0,
        "step_s": 4.0,
        "bound_s": 4.0,
    }
    code, out, _ = qswap(capsys, "plan", "--profile", path, "--budget", "1000000", "--json")
    # One layer's room is the ring: nothing stays, and copying (4 s) cannot overlap computing (4 s).
    answer = json.loads(out)
    assert (answer["resident"], answer["ring_bytes"]) == ([], 1_000_000)
    assert answer["step_s"] == pytest.approx(8.0)
    assert answer["bound_s"] == 4.0
    assert "bound 4.0000 s" in qswap(capsys, "plan", "--profile", path, "--budget", "1000000")[1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_plan_reads_a_profile_that_powershell_has_written(encoding, tmp_path, capsys):
    path = profile(tmp_path / "profile.json")
    path.write_text(path.read_text("utf-8"), encoding)
    code, out, err = qswap(capsys, "plan", "--profile", path, "--budget", "100%")
    assert (code, err) == (0, "")
    assert "4 of 4 layers" in out


def test_plan_refuses_a_budget_that_no_plan_keeps_and_says_which_is_the_least(tmp_path, capsys):
    path = profile(tmp_path / "profile.json")
    code, out, err = qswap(capsys, "plan", "--profile", path, "--budget", "999999")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "999,999 B is too small for any plan" in err
    assert "1,000,000 B" in err


def test_plan_reads_what_the_page_answers_about_a_model_that_has_run(tmp_path, capsys, tiny):
    settings = Settings(budget=Budget.parse("90%"), steps=4, pixels=64)
    host = StandaloneHost(tiny, torch.device("cpu"), settings)
    try:
        path = tmp_path / "residency.json"
        path.write_text(json.dumps(host.snapshot()))
        assert (
            "no model in it has been measured yet"
            in qswap(capsys, "plan", "--profile", path, "--budget", "50%")[2]
        )
        host.generate()
        snapshot = host.snapshot()
    finally:
        host.close()
    path.write_text(json.dumps(snapshot))
    code, out, _ = qswap(capsys, "plan", "--profile", path, "--budget", "100%", "--json")
    layers = snapshot["models"][-1]["layers"]
    assert code == 0
    assert json.loads(out)["resident"] == [layer["name"] for layer in layers]
    assert json.loads(out)["step_s"] == pytest.approx(sum(layer["compute_us"] for layer in layers) / 1e6)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"link_bytes_per_s": 0}, "link_bytes_per_s must be 1 or more"),
        ({"link_bytes_per_s": 5e-324}, "link_bytes_per_s must be 1 or more"),
        ({"link_bytes_per_s": "fast"}, "link_bytes_per_s must be a number"),
        (
            {"layers": [{"name": "a", "bytes": 1e308, "compute_s": 1}]},
            "layers[0].bytes must be a number",
        ),
        ({"layers": [{"name": "a", "bytes": 1, "compute_s": 1e308}]}, "layers[0].compute_s must be a number"),
        ({"link_bytes_per_s": float("nan")}, "link_bytes_per_s must be a number"),
        ({"layers": {}}, "a profile is"),
        ({"layers": [3]}, "layers[0]"),
        ({"layers": [{"name": "a", "bytes": 1.5, "compute_s": 1}]}, "layers[0].bytes must be a whole number"),
        ({"layers": [{"name": "a", "bytes": 1, "compute_s": -1}]}, "layers[0].compute_s"),
        ({"layers": [{"name": "a", "bytes": 1, "compute_s": 1, "read_s": -1}]}, "layers[0].read_s"),
        ({"layers": [{"name": "a", "bytes": 1, "compute_s": 1, "read_s": 2}]}, "for longer than it computes"),
        ({"layers": [{"name": "a", "bytes": 1, "compute_s": 1}] * 2}, "same name"),
    ],
)
def test_a_profile_with_a_wrong_field_is_refused_by_its_name(changes, complaint, tmp_path, capsys):
    path = profile(tmp_path / "profile.json", **changes)
    code, out, err = qswap(capsys, "plan", "--profile", path, "--budget", "50%")
    assert (code, out) == (2, "")
    assert "profile.json" in err
    assert complaint in err
    assert err.count("\n") == 1


def test_doctor_tells_the_facts_of_this_machine(capsys):
    code, out, _ = qswap(capsys, "doctor", "--json")
    import torch

    facts = json.loads(out)
    assert code == 0
    assert facts["versions"]["torch"] == torch.__version__
    assert 0 < facts["ram"]["available"] <= facts["ram"]["total"]
    assert facts["webui"] is None
    assert torch.__version__ in qswap(capsys, "doctor")[1]


def test_doctor_knows_triton_by_the_names_that_it_is_installed_under(monkeypatch):
    from importlib import metadata, util

    from lib_qswap import doctor

    versions = {"triton-windows": "3.4.0"}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(util, "find_spec", lambda name: object())
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"triton": ["triton-windows"]})
    assert doctor._version_of("triton") == "3.4.0 (triton-windows)"
    assert doctor._version_of("another") == "of unknown version"


def test_doctor_ends_with_1_for_a_web_ui_that_is_not_supported(tmp_path, capsys):
    (tmp_path / "modules").mkdir()
    code, out, _ = qswap(capsys, "doctor", "--webui", tmp_path, "--json")
    assert code == 1
    assert json.loads(out)["webui"]["supported"] is False
    code, out, _ = qswap(capsys, "doctor", "--webui", tmp_path)
    assert code == 1
    assert "does not support" in out


def test_bench_measures_loading_at_every_location(tiny_demo, capsys):
    code, out, _ = qswap(capsys, "bench", "load", "--device", "cpu", "--json")
    assert code == 0
    load = json.loads(out)["load"]
    assert set(load["attach_s"]) == {"disk", "cpu", "shared"}
    assert all(seconds > 0 for seconds in load["attach_s"].values())


STEP_SHARES = [0, 0.1, 0.25, 0.5, 0.75, 1]


def test_bench_measures_steps_at_every_location_with_every_budget(tiny_demo, capsys):
    code, out, _ = qswap(capsys, "bench", "step", "--device", "cpu", "--json")
    assert code == 0
    result = json.loads(out)["step"]
    rows = result["rows"]
    assert [(row["location"], row["budget_share"]) for row in rows] == [
        (location, share) for location in ("shared", "cpu", "disk") for share in STEP_SHARES
    ]
    assert len({row["output_sha256"] for row in rows}) == 1
    for row in rows:
        assert row["bound_s"] >= result["compute_s"] > 0
        assert row["ratio"] == pytest.approx(row["step_s"] / row["bound_s"])
        assert (row["swapped_bytes_per_step"] == 0) == (row["resident_share"] == 1)
        assert row["page_locked_bytes"] == 0
        assert row["peak_device_bytes"] is None
    assert rows[0]["resident_share"] < rows[5]["resident_share"] == 1


def test_bench_step_takes_one_location_and_shows_its_rows(tiny_demo, capsys):
    code, out, _ = qswap(capsys, "bench", "step", "--device", "cpu", "--location", "disk")
    assert code == 0
    heading, *rows = out.splitlines()[1:]
    assert "page-locked" in heading
    assert [row.split()[:2] for row in rows] == [["disk", f"{share:.0%}"] for share in STEP_SHARES]


@pytest.mark.simgpu
def test_bench_step_counts_device_peak_and_page_locked_bytes(tiny, sim, engine):
    rows = {
        (row["location"], row["budget_share"]): row
        for row in bench_step.measure(tiny, ("shared", "disk"), torch.device("simgpu"))["rows"]
    }
    payload = rows["shared", 0]["swapped_bytes_per_step"]
    assert rows["shared", 0]["page_locked_bytes"] >= payload
    assert rows["disk", 0]["page_locked_bytes"] == staging_buffers() * STAGING_BUFFER_BYTES
    for location in ("shared", "disk"):
        least, most = rows[location, 0], rows[location, 1]
        assert most["peak_device_bytes"] - least["peak_device_bytes"] > payload / 2
        assert most["resident_share"] == 1


@pytest.mark.simgpu
def test_bench_step_says_where_the_device_has_no_room(tiny, sim, engine, monkeypatch):
    def generate(self, on_step=None):
        if self.settings.budget is None:
            raise torch.cuda.OutOfMemoryError("no room")
        return real(self)

    real = StandaloneHost.generate
    monkeypatch.setattr(StandaloneHost, "generate", generate)
    result = bench_step.measure(tiny, ("cpu",), torch.device("simgpu"))
    assert result["compute_s"] is None
    assert result["rows"][-1] == {"location": "cpu", "budget_share": 1, "out_of_memory": True}
    for row in result["rows"][:-1]:  # Without a step to compare with, a step's own compute counts.
        assert row["bound_s"] >= row["step_s"] - row["stall_s"]
    assert bench_step.table(result)[-1].endswith("the device has no room for it")


def test_ram_that_is_written_to_counts_and_is_given_back():
    before = rss_bytes()
    if before is None:
        pytest.skip("this system does not tell what a process has in RAM")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert rss_bytes() - before > 60 << 20
    del block
    assert rss_bytes() - before < 8 << 20


@pytest.fixture
def small_weight(monkeypatch):
    monkeypatch.setattr(bench_dequant, "WEIGHT_SHAPE", (64, 256))
    monkeypatch.setattr(bench_dequant, "REPEATS", 2)


def test_bench_compares_unpacking_with_a_copy_for_every_type_and_number_of_threads(small_weight, capsys):
    before = torch.get_num_threads()
    code, out, _ = qswap(capsys, "bench", "dequant", "--device", "cpu", "--json")
    rows = json.loads(out)["dequant"]["rows"]
    assert code == 0
    assert torch.get_num_threads() == before
    assert [(row["type"], row["threads"]) for row in rows] == [
        (name, threads) for name in bench_dequant.TYPES for threads in (1, 2)
    ]
    assert set(bench_dequant.TYPES) > set(demo_file.BLOCKS)
    for row in rows:
        for way in ("qswap", "copy"):
            assert 0 < row["fastest_s"][way] <= row["median_s"][way]


COMFYUI_GGUF = """
import gguf, torch
def dequantize(data, qtype, oshape, dtype=None):
    return torch.zeros(oshape)
dequantize_functions = {gguf.GGMLQuantizationType.Q4_K: None}
"""


def test_bench_compares_unpacking_with_the_peers_that_have_the_type(small_weight, tmp_path, capsys):
    pytest.importorskip("gguf")
    (tmp_path / "dequant.py").write_text(COMFYUI_GGUF)
    arguments = ("bench", "dequant", "--device", "cpu", "--types", "Q4_K,Q1_0", "--comfyui-gguf", tmp_path)
    code, out, _ = qswap(capsys, *arguments, "--json")
    ways = {row["type"]: set(row["fastest_s"]) for row in json.loads(out)["dequant"]["rows"]}
    assert code == 0
    assert ways["Q4_K"] >= {"qswap", "copy", "gguf-py", "ComfyUI-GGUF"}
    assert ways["Q1_0"] == {"qswap", "copy"}
    _, out, _ = qswap(capsys, *arguments)
    heading, *rows = [line.split() for line in out.splitlines()[2:]]
    assert heading[:4] == ["type", "threads", "qswap", "copy"]
    assert [row[:2] for row in rows] == [["Q4_K", "1"], ["Q4_K", "2"], ["Q1_0", "1"], ["Q1_0", "2"]]
    assert rows[3][-1] == "-"


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from lib_qswap.cli import main
sys.exit(main(["doctor"]))
"""


def test_a_python_without_torch_is_told_where_there_is_one():
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"qswap: {sys.executable} has no torch: take the Python that the web UI runs on "
        "(`venv` in its folder, or `system\\python` beside it)\n"
    )


GGML = "void dequantize_row_q4_K(const void *x, float *y, long long k) { while (k--) *y++ = 1; }"


def test_bench_calls_ggmls_function_for_every_row(small_weight, tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "ggml.c").write_text(GGML)
    library = tmp_path / "libggml-base.so"
    subprocess.run([compiler, "-shared", "-fPIC", tmp_path / "ggml.c", "-o", library], check=True)
    prepare = bench_dequant.find_peers(None, library, torch.device("cpu"))["ggml C"]

    def run(name: str):
        packed = torch.zeros(64, FORMATS[name].packed_bytes(256), dtype=torch.uint8)
        return prepare(bench_dequant.Weight(FORMATS[name], packed, torch.empty(64, 256)))

    assert run("Q6_K") is None
    assert torch.equal(run("Q4_K")(), torch.ones(64, 256))
    with pytest.raises(ValueError, match="computes on the CPU"):
        bench_dequant.find_peers(None, library, torch.device("cuda"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--size", "32768"], "size must be 16384 pixels or less"),
        (["--seed", "18446744073709551616"], "is no seed"),
        (["--seed", "-1"], "is no seed"),
        (["--budget", "9" * 400], "more than any device has"),
        (["--budget", "9" * 400 + "%"], "more than any device has"),
    ],
)
def test_numbers_that_are_too_large_are_refused_in_a_line(arguments, complaint, tiny, capsys):
    code, out, err = qswap(capsys, "run", str(tiny), "--headless", "--device", "cpu", *arguments)
    assert (code, out) == (2, "")
    assert complaint in err
    assert "Traceback" not in err


def test_a_size_that_cannot_be_is_refused_before_the_demo_model_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QSWAP_CACHE", str(tmp_path))
    code, _, err = qswap(capsys, "demo", "--headless", "--device", "cpu", "--size", "100")
    assert code == 2
    assert "size must be a multiple of 16" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "models", [[{"step": 5, "layers": [{}]}], [{"step": [1], "layers": [1]}], [{"layers": 5}]]
)
def test_a_page_that_answered_something_else_is_no_profile(models, tmp_path, capsys):
    path = tmp_path / "residency.json"
    path.write_text(json.dumps({"models": models}))
    code, _, err = qswap(capsys, "plan", "--profile", path, "--budget", "50%")
    assert code == 2
    assert "no model in it has been measured yet" in err

"""The benchmark for GPUs runs from end to end with tiny tensors, on the CPU and on the simulated accelerator,
and keeps what it has when a part fails or time runs out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SUITE = BENCHMARKS / "gpu_suite.py"
SECTIONS = ("environment", "ceilings", "unpack", "page_lock", "host", "engine")
TYPES = ("Q8_0", "Q4_K", "Q5_K", "Q6_K")
sys.path.append(str(BENCHMARKS))


def run(device: str, path: Path, *options: str) -> dict:
    env = os.environ | {"QSWAP_CACHE": str(path.parent)}
    command = [sys.executable, str(SUITE), "--device", device, "--small", *options, "--json", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=1800, env=env)
    return json.loads(path.read_text())


@pytest.fixture(scope="module", params=["cpu", pytest.param("simgpu", marks=pytest.mark.simgpu)])
def suite(request, tmp_path_factory):
    """Device, the suite's result and that of its steps."""
    if request.param == "simgpu":
        request.getfixturevalue("simgpu")
    path = tmp_path_factory.mktemp("gpu_suite") / "result.json"
    result = run(request.param, path, "--types", ",".join(TYPES))
    return request.param, result, json.loads(path.with_name("result_steps.json").read_text())


def test_no_part_fails_and_none_is_left_out(suite):
    _, result, steps = suite
    assert result["errors"] == {}
    assert result["unpack"]["left_out"] == []
    assert all(case["left_out"] == [] for case in steps["cases"])


def test_ceilings_are_measured_first(suite):
    device, result, _ = suite
    rates = {"device_copy_bytes_per_s", "link_pageable_bytes_per_s", "matrix_operations_per_s"}
    if device != "cpu":
        rates |= {"link_page_locked_bytes_per_s", "link_back_page_locked_bytes_per_s"}
    assert set(result["ceilings"]) == rates
    assert all(rate > 0 for rate in result["ceilings"].values())


def test_every_type_is_unpacked_and_the_chains_unpack_the_same_weights(suite):
    _, result, _ = suite
    assert tuple(result["unpack"]["types"]) == TYPES
    for name, rows in result["unpack"]["types"].items():
        assert len(rows) == 2
        for row in rows:
            assert row["torch_bytes_per_s"] * row["torch_s"] == pytest.approx(row["bytes"])
            assert row["torch_of_copy"] == pytest.approx(
                row["torch_bytes_per_s"] / result["unpack"]["copy_bytes_per_s"]
            )
            if name != "Q8_0":
                assert row["chain_s"] > 0
                # Two roundings to bf16 or fp16 apart.
                assert row["chain_difference"] < 0.01


def test_page_locking_is_tried_and_refused_without_harm(suite):
    device, result, _ = suite
    found = result["page_lock"]
    assert found["can_page_lock"] == (device != "cpu")
    if device != "cpu":
        assert found["refused"] is None
        assert "was refused" in found["second_time"]
        assert found["works_after_refusal"]
        assert found["from_registered_bytes_per_s"] > 0
        assert found["from_allocator_bytes_per_s"] > 0


def test_the_hosts_part_of_a_layer_is_measured(suite):
    _, result, _ = suite
    row = result["host"]
    assert 0 < row["swapped_layers"] <= row["layers"]
    assert 0 < row["together_layers"] <= row["layers"]
    assert all(row[name] > 0 for name in ("plain_s", "resident_s", "swapped_s", "together_s"))
    assert row["until_done_s"] >= min(row["resident_s"], row["swapped_s"])
    assert {"record", "wait", "copy_on_stream"} <= row["calls_s"].keys()
    assert all(seconds > 0 for seconds in row["calls_s"].values())


def test_a_model_leaves_the_device_without_a_copy_and_comes_back(suite):
    device, result, _ = suite
    row = result["engine"]["switching"]
    assert row["d2h_bytes"] == 0
    assert row["first_step_s"] > 0
    assert row["transfer_s"] > 0
    ahead = result["engine"]["running_ahead"]
    assert ("peak_device_bytes" in ahead) == (device != "cpu")


def test_what_is_kept_of_a_prompt_is_measured_and_right(suite):
    device, result, _ = suite
    rows = result["engine"]["prompts"]
    assert [row["budget_share"] for row in rows] == ([0.25] if device == "cpu" else [])
    assert all(row["same_output"] for row in rows)
    assert all(row[name] > 0 for row in rows for name in ("own_s", "same_prompt_s", "new_prompt_s"))


def test_steps_are_measured_at_every_location(suite):
    device, _, steps = suite
    names = {"QSwap shared", "QSwap cpu", "QSwap disk", "all resident"}
    for case in steps["cases"]:
        rows = {row["system"]: row for row in case["rows"]}
        assert names <= set(rows)
        assert all(row["step_s"] > 0 for row in rows.values())
        if device == "cpu":  # The simulated one's layers do not compute.
            assert rows["dense float32"]["packed_over_dense"] > 0
            assert all(row["same_output"] is not False for row in rows.values())
            share = [
                rows[name]["swapped_bytes_per_step"] for name in ("QSwap shared, next image", "QSwap shared")
            ]
            assert share[0] < 0.8 * share[1]


def test_the_figures_that_are_aimed_at_are_in_the_result(suite):
    device, result, _ = suite
    found = {target["what"]: target for target in result["targets"]}
    assert {f"{name}: of copy bandwidth" for name in TYPES} <= set(found)
    assert found["bytes back to the host when a model leaves"]["met"]
    assert any("QSwap disk at 25%, over the bound" in what for what in found)
    assert ("16 x 16: all resident over dense float32" in found) == (device == "cpu")
    assert ("device peak over budget and activations" in found) == (device != "cpu")


def test_the_tables_of_the_readme_have_every_type_and_every_system(suite):
    from gpu_tables import tables

    _, result, steps = suite
    lines = tables(result, steps)
    first_cells = {line.split("|")[1].strip() for line in lines if line.startswith("| ")}
    assert set(TYPES) | {"all resident", "QSwap shared", "QSwap cpu", "QSwap disk"} <= first_cells
    assert lines[0].startswith(result["environment"]["name"])
    assert sum(line.startswith("Steps at ") for line in lines) == len(steps["cases"])
    assert any(line.startswith("A model of ") for line in lines)


def test_the_cards_stand_beside_the_fastest_of_the_other_programs():
    from gpu_tables import cards

    def row(system, step_s, **more):
        return {"system": system, "step_s": step_s, **more}

    case = {"stands_for": "a card of 6 GB", "limit_bytes": 6e9, "link_bytes_per_s": 12.2e9, "compute_s": 0.2}
    own = [row(f"QSwap {kind}", step_s, location=kind) for kind, step_s in (("shared", 0.21), ("disk", 0.3))]
    again = row("QSwap shared, next image", 0.19, location="shared")
    others = [
        row("mmgp", 0.5),
        row("leaf_level stream", 0.4),
        {"system": "accelerate", "error": "out of memory"},
    ]
    whole = {**case, "stands_for": None, "rows": own}
    steps = {
        "environment": {"quant": "Q4_K", "model_bytes": 6.8e9},
        "cases": [whole, {**case, "rows": [*own, again, *others]}, {**case, "limit_bytes": 8e9, "rows": own}],
    }
    *_, first, second = cards({"environment": {"name": "H200"}}, steps)
    assert first == "| 6 GB, 12 GB/s | 0.200 s | 0.210 s |  | 0.300 s | 0.400 s (leaf level stream) |"
    assert second.startswith("| 8 GB")
    assert second.endswith("| not measured |")
    assert cards({}, {**steps, "cases": [whole]}) == []


def test_the_tables_show_least_and_most_over_shapes_and_nothing_that_is_missing():
    from gpu_tables import tables

    assert tables({"dtype": "bfloat16"}, {}) == []
    rows = [
        {
            "triton_of_copy": 0.86,
            "triton_of_same_size_copy": 0.91,
            "triton_times_faster_than_chain": 5.04,
            "product": {"fused_of_copy": 0.71},
        },
        {
            "triton_of_copy": 0.93,
            "triton_of_same_size_copy": 0.94,
            "triton_times_faster_than_chain": 7.0,
            "product": {"fused_of_copy": 0.8},
        },
        {"error": "out of device memory"},
    ]
    card = {"stands_for": "stands for a card of 6 GB", "case": "1024 x 1024", "link_bytes_per_s": 12e9}
    dense = {
        "system": "dense bfloat16",
        "step_s": 1.0,
        "packed_over_dense": 1.04,
        "peak_device_bytes": 24e9,
        "page_locked_bytes": 0,
        "rss_bytes": None,
    }
    steps = {"cases": [card | {"rows": [dense, {"system": "mmgp", "error": "no"}]}]}
    lines = tables({"dtype": "bfloat16", "unpack": {"types": {"Q4_K": rows}}}, steps)
    assert "| Q4_K | 86% to 93% | 91% to 94% | 5.0 to 7.0 | 71% to 80% |" in lines
    assert "Steps at 1024 x 1024; stands for a card of 6 GB (link 12.0 GB/s):" in lines
    assert "| dense bfloat16 |  | 1.000 s |  |  | 24.00 GB | 0 MB |  |" in lines
    assert "| mmgp |  | no | | | | | |" in lines
    assert lines[-1] == "All resident takes 1.040 times dense bfloat16."


def test_the_readme_gets_every_gpu_that_was_measured(tmp_path, monkeypatch):
    import fill_readme

    environment = {"name": "One GPU", "torch": "2.13.0", "triton": "3.7.1"}
    ceilings = {"device_copy_bytes_per_s": 2e12, "matrix_operations_per_s": 7e14}
    measured = {"dtype": "bfloat16", "environment": environment, "ceilings": ceilings}
    (tmp_path / "gpu_one.json").write_text(json.dumps(measured))
    (tmp_path / "gpu_one_steps.json").write_text('{"cases": []}')
    monkeypatch.setattr(fill_readme, "RESULTS", tmp_path)
    assert fill_readme.gpu(fill_readme.tables) == [
        "One GPU, PyTorch 2.13.0, Triton 3.7.1: copies within the device 2000.0 GB/s; products of matrices "
        "700 Top/s."
    ]


# ------------------------------------------------------------------------------------ parts that do not end
def test_a_part_that_fails_or_takes_too_long_costs_no_other(tmp_path, monkeypatch):
    import gpu_suite

    arguments = SimpleNamespace(
        device="cpu",
        types=["Q4_K"],
        dtype="bfloat16",
        forge=None,
        small=True,
        cards="6:12",
        steps=6,
        time_limit=1000.0,
        json=tmp_path / "result.json",
    )
    suite = gpu_suite.Suite(arguments)
    script = {
        "environment": "open(part, 'w').write('{}')",
        "ceilings": "raise SystemExit(3)",
        "unpack": "open(part, 'w').write('{\"types\": {}}'); time.sleep(60)",
        "page_lock": "import os; os.abort()",
        "host": "open(part, 'w').write('{}')",
        "engine": "open(part, 'w').write('{\"switching\": 1}')",
        "steps": "raise OSError",
    }
    child = gpu_suite.Suite._child

    def stand_in(self, name, command, limit_s):
        code = f"import sys, time; part = sys.argv[-1]; {script[name]}"
        child(self, name, ["-c", code, *command], 3 if name == "unpack" else 60)

    monkeypatch.setattr(gpu_suite.Suite, "_child", stand_in)
    monkeypatch.setattr(gpu_suite, "model_file", lambda small: None)
    monkeypatch.setattr(gpu_suite, "targets", lambda *_: [])
    assert suite.run() == arguments.json
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["errors"] == {
        "ceilings": "ended with exit code 3",
        "unpack": "cut off after 3 s",
        "page_lock": "ended with exit code -6" if sys.platform != "win32" else "ended with exit code 3",
        "steps": "ended with exit code 1",
    }
    assert result["unpack"] == {"types": {}}
    assert result["engine"] == {"switching": 1}
    assert "ceilings" not in result


def test_the_result_is_named_after_the_device(monkeypatch, tmp_path):
    import gpu_suite

    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    suite = gpu_suite.Suite(SimpleNamespace(dtype="bfloat16", json=None, time_limit=1.0, device="cuda"))
    suite.result["environment"] = {"name": "NVIDIA H100 80GB HBM3"}
    assert suite._save() == tmp_path / "benchmarks" / "results" / "gpu_nvidia_h100_80gb_hbm3.json"


def test_without_time_there_is_a_result_that_says_so(tmp_path):
    result = run("cpu", tmp_path / "result.json", "--time-limit", "0")
    assert set(result["errors"]) == set(SECTIONS) | {"steps"}
    assert set(result["errors"].values()) == {"no time was left"}
    assert result["targets"] == []


def test_types_that_time_does_not_reach_are_named(monkeypatch):
    import gpu_unpack

    taken = []
    clock = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr(gpu_unpack.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(gpu_unpack, "measure_type", lambda format, *_: taken.append(format.name) or {})
    left = gpu_unpack.unpacking(TYPES, None, None, 1.0, True, 2.0, lambda name, row: None)
    assert taken == ["Q8_0", "Q8_0", "Q4_K", "Q4_K"]
    assert left == ["Q5_K", "Q6_K"]


def test_the_types_that_are_compared_with_the_chains_come_first():
    import gpu_unpack

    assert set(gpu_unpack.TYPES[:3]) == {"Q4_K", "Q5_K", "Q6_K"}
    assert len(set(gpu_unpack.TYPES)) == len(gpu_unpack.TYPES) > 20


def test_targets_take_the_worst_shape_and_know_which_way_is_better():
    from gpu_targets import targets

    product = {"fused_of_copy": 0.75}
    same = {"triton_of_same_size_copy": 0.95}
    suite = {
        "unpack": {
            "types": {
                "Q4_K": [
                    {"triton_of_copy": 0.9, "torch_of_copy": 0.1, "triton_times_faster_than_chain": 5.0}
                    | same,
                    {"triton_of_copy": 0.8, "torch_of_copy": 0.1, "product": product} | same,
                    {"error": "out of device memory"},
                ]
            }
        }
    }
    case = {"case": "1024 x 1024", "stands_for": None}
    rows = [
        {"system": "dense bfloat16", "packed_over_dense": 1.04},
        {"system": "QSwap cpu", "location": "cpu", "budget_share": 0.1, "ratio": 1.11},
        {"system": "QSwap cpu", "location": "cpu", "budget_share": 0.25, "ratio": 1.11},
        {"system": "QSwap cpu", "location": "cpu", "budget_share": 0.0, "ratio": 9.0},
        {"system": "diffusers", "ratio": 9.0},
    ]
    found = [(t.what, t.value, t.met) for t in targets(suite, {"cases": [case | {"rows": rows}]})]
    assert found == [
        ("Q4_K: of copy bandwidth", 0.8, False),
        ("Q4_K: of a copy of that size", 0.95, True),
        ("Q4_K: times the torch chain", 5.0, True),
        ("Q4_K: one token, of copy bandwidth", 0.75, True),
        ("1024 x 1024: all resident over dense bfloat16", 1.04, True),
        ("1024 x 1024: QSwap cpu at 10%, over the bound", 1.11, True),
        ("1024 x 1024: QSwap cpu at 25%, over the bound", 1.11, False),
    ]

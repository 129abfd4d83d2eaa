"""The benchmark of step times: every system in every case, and QSwap near the least that a step can take."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
CASES = ("compute-bound", "balanced", "link-bound")
SHARES = (0.1, 0.25, 0.75)
QUICK_STEPS = 2
OVER_BOUND = {"shared": 1.03, "cpu": 1.05, "disk": 1.10}
MORE_AT_10_PERCENT = 0.07


def run(*command: str | Path, cache: Path) -> None:
    environment = os.environ | {"QSWAP_CACHE": str(cache)}
    subprocess.run(
        [sys.executable, *map(str, command)], check=True, capture_output=True, timeout=1800, env=environment
    )


@pytest.fixture(scope="module")
def result_file(simgpu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("step_times")
    path = folder / "step_times.json"
    run(BENCHMARKS / "step_times.py", "--quick", "--json", path, cache=folder)
    return path


@pytest.fixture(scope="module")
def result(result_file):
    return json.loads(result_file.read_text())


@pytest.fixture(params=CASES)
def case(request, result):
    return next(case for case in result["cases"] if case["case"] == request.param)


def swapped_rows(case):
    return [row for row in case["rows"] if "location" in row]


@pytest.mark.simgpu
def test_every_location_is_measured_with_every_budget_and_computes_the_same(case):
    assert {(row["location"], row["budget_share"]) for row in swapped_rows(case)} == {
        (location, share) for location in OVER_BOUND for share in SHARES
    }
    for row in case["rows"]:
        assert row["same_output"], row
        for name in ("step_s", "peak_device_bytes", "page_locked_bytes", "rss_bytes"):
            assert math.isfinite(row[name]), (name, row)


@pytest.mark.simgpu
def test_a_step_takes_hardly_longer_than_the_longer_of_compute_and_transfers(case):
    for row in swapped_rows(case):
        most = OVER_BOUND[row["location"]] + (MORE_AT_10_PERCENT if row["budget_share"] < 0.25 else 0)
        if case["case"] == "balanced" and row["budget_share"] == 0.25:
            # Compute and link are even here, and the double blocks have more bytes for their compute than
            # the single ones: what is not in the ring by then is waited for, and a larger ring takes the
            # place of residents. A long search (planner_judge.py) finds no step that is 0.5 % shorter.
            most = 1.08
        assert 0.999 < row["ratio"] <= most, row


@pytest.mark.simgpu
def test_the_cases_are_what_their_names_say(result):
    bounds = {
        case["case"]: [row["bound_s"] / case["compute_s"] for row in swapped_rows(case)]
        for case in result["cases"]
    }
    assert set(bounds["compute-bound"]) == {1.0}
    assert 1 < max(bounds["balanced"]) < 1.5
    assert max(bounds["link-bound"]) > 3


@pytest.mark.simgpu
def test_no_other_program_that_is_installed_takes_less_time(case):
    peers = [row for row in case["rows"] if "ratio" in row and "location" not in row]
    slowest = max(row["step_s"] for row in swapped_rows(case))
    for row in peers:
        # With a fast enough link, in a time without hosts, to look one layer ahead is enough: the same time.
        assert row["step_s"] >= slowest * (0.997 if case["case"] == "compute-bound" else 1), row


@pytest.mark.simgpu
def test_nothing_is_read_before_it_has_arrived_or_overwritten_before_it_was_read(result):
    assert not result["hazards"]


@pytest.mark.simgpu
def test_a_run_out_of_time_says_what_it_left_out_and_keeps_the_rest(simgpu, tmp_path):
    path = tmp_path / "result.json"
    options = ("--hidden", "256", "--steps", "1", "--time-limit", "0", "--json", path)
    run(BENCHMARKS / "step_times.py", *options, cache=tmp_path)
    cases = json.loads(path.read_text())["cases"]
    assert [case["case"] for case in cases] == list(CASES)
    for case in cases:
        assert [row["system"] for row in case["rows"]] == ["all resident"]
        assert {"QSwap shared", "QSwap cpu", "QSwap disk"} <= set(case["left_out"])


@pytest.mark.simgpu
def test_a_device_that_stands_for_a_card_runs_every_system_again_and_is_labelled(sim, engine, result_file):
    import step_times
    from step_rigs import SimulatedRig

    model = next(result_file.parent.glob("*.gguf"))
    rig = SimulatedRig(model, compute_s=1.0, virtual=True)
    rig.cases = {"balanced": 4 / 3}
    shown = []
    suite = step_times.Suite(
        rig,
        steps=QUICK_STEPS,
        shares=(0.25,),
        cards=step_times.cards("0.12:0.08,0.2:0.05"),
        forge=None,
        job={},
        end_s=math.inf,
        on_rows=lambda case, rows: shown.extend(rows),
    )
    suite.run()
    own, *cards = suite.cases
    assert own["stands_for"] is None
    rows = [row for case in suite.cases for row in case["rows"]]
    assert len(shown) == len(rows)
    assert all(row in rows for row in shown)
    for card, memory, link in zip(cards, ("0.12", "0.2"), ("0.08", "0.05"), strict=True):
        assert (
            card["stands_for"]
            == f"stands for a card of {memory} GB: memory capped, link throttled to {link} GB/s"
        )
        assert card["link_bytes_per_s"] == float(link) * 1e9
        assert {row["system"] for row in card["rows"]} == {row["system"] for row in own["rows"][1:]}
        for row in swapped_rows(card):
            assert row["peak_device_bytes"] < card["limit_bytes"]
            assert row["same_output"]
            assert row["ratio"] < 1.1
    few, many = (case["rows"][0]["resident_share"] for case in cards)
    assert few < 0.6 < 0.8 < many


def test_cards_are_written_as_memory_and_link():
    import step_times

    assert step_times.cards("6:12.5") == [(6_000_000_000, 12.5e9)]
    for wrong in ("6", "6:12:1", "a:b", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is not like 6:12,8:13"):
            step_times.cards(wrong)


@pytest.mark.simgpu
def test_the_plot_has_a_curve_for_every_system_in_every_case(result, result_file, tmp_path):
    svg = tmp_path / "plot.svg"
    run(BENCHMARKS / "step_plot.py", result_file, "--svg", svg, cache=tmp_path)
    lines = xml.etree.ElementTree.parse(svg).findall(".//{http://www.w3.org/2000/svg}polyline")
    systems = {row["system"] for row in result["cases"][0]["rows"] if "ratio" in row}
    assert len(lines) == len(CASES) * (len(systems) + 1)

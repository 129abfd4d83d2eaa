"""benchmarks/budget_sweep.py, shortened: no budget that is set by hand is better than the automatic one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("engine", "sim")]


def test_no_fixed_budget_is_better_than_the_automatic_one():
    import budget_sweep

    for automatic, *fixed in budget_sweep.sweep(16 << 20, (48, 64, 72)).values():
        assert automatic["budget_bytes"] is None
        assert not automatic["ran_out"]
        assert automatic["step_s"] <= min(row["step_s"] for row in fixed)
    # The larger step leaves less for weights: the two kinds of steps differ in what is best.
    assert [row["ran_out"] for row in fixed] == [False, False, True]
    assert fixed[0]["step_s"] > 1.2 * fixed[1]["step_s"]

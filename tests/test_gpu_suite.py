"""The benchmark for GPUs runs from end to end, on the CPU with tiny tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_suite.py"
TYPES = ("Q8_0", "Q4_K", "Q5_K", "Q6_K")


def test_every_part_is_measured_and_the_chains_unpack_the_same_weights(tmp_path):
    path = tmp_path / "result.json"
    env = os.environ | {"QSWAP_CACHE": str(tmp_path)}
    command = [sys.executable, str(SUITE), "--device", "cpu", "--small", "--types", ",".join(TYPES)]
    subprocess.run([*command, "--json", str(path)], check=True, capture_output=True, timeout=300, env=env)
    result = json.loads(path.read_text())
    assert result["ceilings"]["device_copy_bytes_per_s"] > 0
    assert tuple(result["unpack"]) == TYPES
    for name, rows in result["unpack"].items():
        for row in rows:
            assert row["torch_bytes_per_s"] * row["torch_s"] == pytest.approx(row["bytes"])
            if name != "Q8_0":
                assert row["chain_s"] > 0
                # Two roundings to bf16 or fp16 apart.
                assert row["chain_difference"] < 0.01
    (case,) = json.loads((tmp_path / "result_steps.json").read_text())["cases"]
    rows = {row["system"]: row for row in case["rows"]}
    assert {"all resident", "QSwap shared", "QSwap cpu", "QSwap disk"} <= set(rows)
    assert all(row["step_s"] > 0 and row["same_output"] for row in rows.values())

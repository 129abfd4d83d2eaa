"""Triton's kernels without a GPU: their values in Triton's interpreter, and the code that they compile to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib_qswap.quant import kernels
from lib_qswap.quant.formats import FORMATS

pytest.importorskip(
    "triton",
    minversion="3.3",  # 3.2 compiles for the device that is there alone, older ones for none
    reason="Triton is not installed: pip install -e '.[test]'",
    exc_type=ImportError,
)

TESTS = Path(__file__).resolve().parent
BLOCK_TYPES = [row for row in FORMATS.values() if row.unpack and row.dtype is None]
EVERY_TYPE = pytest.mark.parametrize("format", BLOCK_TYPES, ids=lambda row: row.name)


def test_interpreted_kernels_give_the_bits_of_torchs_operations():
    """Whether Triton interprets is settled at its import: they run in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_triton.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False, timeout=1800
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"^\d+ passed", result.stdout, re.MULTILINE), result.stdout


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Launches end at the compiler, for an H100, which need not be there: a list of what it made."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class AnyDriver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    made = []

    def compile_only(launch, grid):
        return lambda *args, **options: made.append(launch.warmup(*args, grid=grid, **options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", AnyDriver())
    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    return made


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"])
def test_a_product_is_summed_by_fused_multiply_adds_and_needs_no_stack(name, compiled):
    from lib_qswap.quant.multiply_triton import multiply

    format = FORMATS[name]
    packed = torch.empty((64, format.packed_bytes(512)), dtype=torch.uint8)
    x, bias = torch.empty((2, 512), dtype=torch.bfloat16), torch.empty(64)
    multiply(kernels.load(format), format, packed, x, bias, torch.empty((2, 64)))
    (made,) = compiled
    assert "fma.rn.f32" in made.asm["ptx"]
    assert ".local" not in made.asm["ptx"]
    # Threads exchange sums at the end only, of two inputs, and a few scales.
    assert made.asm["ptx"].count("shfl.sync") < 2 * 5 + 16


@pytest.mark.parametrize("rows", [64, 8192])
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_product_by_lanes_exchanges_nothing_before_its_end(compiled, monkeypatch, rows, tokens):
    from lib_qswap.quant import multiply_lanes

    monkeypatch.setattr(multiply_lanes, "_is_served", lambda device: True)
    at_once = (4 if rows == 8192 else 2) // tokens
    for name, lanes in multiply_lanes.LANES.items():
        format = FORMATS[name]
        packed = torch.empty((rows, format.packed_bytes(512)), dtype=torch.uint8)
        x, bias = torch.empty((tokens, 512), dtype=torch.bfloat16), torch.empty(rows)
        multiply = multiply_lanes.multiply_for(format, packed, x, rows)
        assert multiply.args == (lanes, at_once)
        multiply(format, packed, x, bias, torch.empty((tokens, rows)))
        code = compiled.pop().asm["ptx"]
        assert "bar.sync" not in code[: code.index("shfl.sync")]
        assert "prmt.b32" in code
        assert ("sub.rn.f32 number" in code) == (name == "Q8_0")
        assert ".local" not in code
        # Sums of 32 threads, of each token's rows.
        assert code.count("shfl.sync") == 5 * at_once * tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["exact", "like Forge"])
@EVERY_TYPE
def test_the_code_of_a_kernel_keeps_every_rounding_and_stores_sixteen_bytes_at_once(format, dtype, compiled):
    packed = torch.empty(64 * format.block_bytes, dtype=torch.uint8)
    out = torch.empty(64 * format.block_elements, dtype=torch.bfloat16)
    kernels.load(format).unpack(packed, out, format.block_elements, dtype)
    (made,) = compiled
    code = made.asm["ptx"]
    # Without a rounding of its own, a product may be fused with a sum later on.
    assert set(re.findall(r"\b(?:mul|add|sub|fma)\.(?:\w+\.)?f32", code)) <= {
        "mul.rn.f32",
        "add.rn.f32",
        "sub.rn.f32",
    }
    assert "mul.rn.f32" in code
    assert ".ftz" not in code, "small numbers are flushed to zero"
    assert re.search(r"cvt\.rn\.bf16", code), "not rounded to nearest"
    kernel = kernels.load(format)
    stores = kernel.tile_elements // (kernel.warps * 32 * 8)
    assert re.findall(r"st\.global\.(\w+)\.b32", code) == ["v4"] * stores

"""Unpacking like Forge: bit for bit what unpatched Forge computes, in fp16 and in bf16.

The digests are of Forge's own output: its GGUF parameter, baked and dequantized on the CPU (June 2025, torch
2.13), cast to the computation dtype, for the blocks of `ggml_blocks.random_blocks(format, 67, ...)`.
"""

from __future__ import annotations

import hashlib

import ggml_blocks
import pytest
import torch

import lib_qswap.quant.unpack as unpacking
from lib_qswap.quant.formats import FORMATS
from lib_qswap.quant.unpack import unpack

# sha256, the first 16 digits: "ordinary" scales in fp16 and bf16, then "any" scale in fp16 and bf16.
DIGESTS = {
    "Q4_0": "b70dac34f43061ea d27ff13dceca66b7 7063394186c64566 17878106ed749b31",
    "Q4_1": "d521268ab46b3ab6 5decae3c54a212f8 39c9d1251d617382 c4f4f08fa205adfa",
    "Q5_0": "e6d17b635d84cc8a ccc6d90f01fa1fd0 067ab1ca461c2456 77bd8d13b7dfbb55",
    "Q5_1": "3434afb728a12c83 7b76c5da97e97d7c bc588e1802294dbd 0da904113c1b69c7",
    "Q8_0": "cf57043650ed1361 e49b05e5a18e3b19 e40fd7ab1e02135d cee86c86a22fd3df",
    "Q2_K": "61dba1f9ac56fbf7 24a29c3420e1a433 309cb31076c296fd f859ca207cb7f9a0",
    "Q3_K": "3c6b9e9eb456ecaf 0967939a54e484e2 5ecdc89359a1daf7 64c47c24d85b71c9",
    "Q4_K": "770617b59b7ef56f 6d28f62c6277ee85 33eaf73c096809e2 3c76e8e9f0254826",
    "Q5_K": "147bc78f8d757d08 7c2599fa12850ff1 3df8669f6467dc30 4029fe8b58c1f5db",
    "Q6_K": "4515acbbc4f654cf bdf47b77326d9abd 33a8fba3c27d5074 3f35e8139f226ee6",
    "BF16": "b6b1da11faf3a231 b2200d35dc808316 b6b1da11faf3a231 b2200d35dc808316",
}
FORGE_TYPES = pytest.mark.parametrize("name", DIGESTS)
COMPUTATION = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
SCALES = pytest.mark.parametrize("scales", ["ordinary", "any"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 16 super-blocks, so that a small tensor has several."""
    monkeypatch.setattr(unpacking, "_CPU_CHUNK_ELEMENTS", -(-4096 // torch.get_num_threads()))
    monkeypatch.setattr(unpacking, "_TEMPORARY_BYTES", 4096 * 2)


def unpacked(name, scales, dtype, out_dtype, device="cpu", arithmetic="like Forge") -> torch.Tensor:
    format = FORMATS[name]
    packed = torch.from_numpy(ggml_blocks.random_blocks(format, 67, scales)).to(device)
    out = torch.empty(67 * format.block_elements, dtype=out_dtype, device=device)
    return unpack(format, packed, out, arithmetic=arithmetic, computation_dtype=dtype).cpu()


def digest(values: torch.Tensor) -> str:
    """NaN, which Forge's fp16 makes of overflowing scales, counts as zero: its bits are not defined."""
    defined = values.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    return hashlib.sha256(defined.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@FORGE_TYPES
@COMPUTATION
@SCALES
def test_values_have_the_digest_of_forges_own(name, dtype, scales):
    of_forge = DIGESTS[name].split()[2 * (scales == "any") + (dtype == torch.bfloat16)]
    assert digest(unpacked(name, scales, dtype, dtype)) == of_forge


@FORGE_TYPES
@COMPUTATION
@SCALES
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_another_output_dtype_is_a_cast_of_the_same_values(name, dtype, scales, out_dtype):
    # Forge has BF16 in fp32, whatever the computation dtype.
    computed = unpacked(name, scales, dtype, torch.float32 if name == "BF16" else dtype)
    values = unpacked(name, scales, dtype, out_dtype)
    torch.testing.assert_close(values, computed.to(out_dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_1", "Q6_K"])
def test_the_arithmetics_differ_where_rounding_shows_and_nowhere_by_much(name):
    exact = unpacked(name, "ordinary", torch.float16, torch.float16, arithmetic="exact").float()
    like_forge = unpacked(name, "ordinary", torch.float16, torch.float16).float()
    assert (exact != like_forge).any()
    assert (exact - like_forge).abs().max() <= 2e-3 * exact.abs().max()


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_XS", "MXFP4"])
def test_in_fp32_and_for_types_that_forge_lacks_it_is_the_exact_arithmetic(name):
    exact = unpacked(name, "ordinary", None, torch.float16, arithmetic="exact")
    dtype = torch.float32 if name == "Q4_K" else torch.bfloat16
    torch.testing.assert_close(unpacked(name, "ordinary", dtype, torch.float16), exact, rtol=0, atol=0)


def test_fp16_is_the_default_computation_dtype_as_in_forge():
    by_default = unpacked("Q4_K", "ordinary", None, torch.float32)
    torch.testing.assert_close(
        by_default, unpacked("Q4_K", "ordinary", torch.float16, torch.float32), rtol=0, atol=0
    )


def test_another_computation_dtype_is_refused():
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        unpacked("Q4_K", "ordinary", torch.float64, torch.float16)


@pytest.mark.simgpu
def test_a_device_gives_the_same_values_for_every_type(sim, compute_mode):
    for name in DIGESTS:
        for dtype, out_dtype in ((torch.float16, torch.float16), (torch.bfloat16, torch.float16)):
            on_device = unpacked(name, "ordinary", dtype, out_dtype, device="simgpu")
            on_cpu = unpacked(name, "ordinary", dtype, out_dtype)
            assert torch.equal(on_device.view(torch.int16), on_cpu.view(torch.int16)), name

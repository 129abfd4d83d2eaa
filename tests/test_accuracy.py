"""How far one evaluation of a Flux-shaped model is from one in fp32, with either arithmetic."""

from __future__ import annotations

import pytest
import torch

from lib_qswap.quant.gguf_file import open_gguf
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.quant.unpack import Arithmetic
from lib_qswap.standalone.demo_file import make_demo_file
from lib_qswap.standalone.denoise import denoise
from lib_qswap.standalone.flux import build


def evaluate(path, dtype: torch.dtype, arithmetic: Arithmetic) -> torch.Tensor:
    """The latent after one step, computed in `dtype` from weights unpacked with `arithmetic`."""
    model = build(open_gguf(path), str(path), dtype=dtype)
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if isinstance(weight, PackedTensor):
                unpacked = weight.dequantize(dtype, arithmetic=arithmetic, computation_dtype=dtype)
                module._parameters[name] = torch.nn.Parameter(unpacked, requires_grad=False)
    latent = denoise(
        model,
        device=torch.device("cpu"),
        dtype=dtype,
        steps=1,
        pixels=128,
        seed=0,
        synchronize=lambda: None,
    ).latent
    assert latent.isfinite().all()
    assert latent.std() > 0
    return latent


@pytest.mark.parametrize("quant", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_exact_arithmetic_is_no_farther_from_fp32_than_forges(tmp_path, quant, dtype):
    path = tmp_path / "model.gguf"
    make_demo_file(path, quant, hidden=256, double=2, single=3)
    reference = evaluate(path, torch.float32, "exact")

    exact = (evaluate(path, dtype, "exact") - reference).norm()
    like_forge = (evaluate(path, dtype, "like Forge") - reference).norm()

    assert 0 < exact < 0.05 * reference.norm()
    # Rounding goes either way: where both round a weight once, they differ by chance alone.
    assert exact <= 1.02 * like_forge

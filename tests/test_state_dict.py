"""Checkpoints quantized by bitsandbytes and to FP8: packed exactly, or refused with the reason."""

from __future__ import annotations

import json
from statistics import NormalDist

import numpy as np
import pytest
import torch
from bnb_checkpoint import NF4, quantized
from test_unpack_exact import assert_same_bits

from lib_qswap import attach
from lib_qswap.quant.bnb_weight import STATE_KEY
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.quant.state_dict import pack_state_dict

KINDS = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
NESTED = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


def test_nf4_stands_for_quantiles_of_the_normal_distribution():
    """QLoRA, section 3: 8 steps above zero and 7 below, each half from its own evenly spaced quantiles."""
    quantile, outermost = NormalDist().inv_cdf, 0.9677083
    upper = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    lower = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    values = np.array(sorted([*lower, 0.0, *upper]))
    np.testing.assert_allclose(NF4, values / values.max(), atol=2e-7)


@KINDS
@NESTED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_a_weight_of_bitsandbytes_is_its_values_bit_for_bit(quant_type, nested, dtype, blocksize):
    weight = quantized(quant_type, (40, 320), blocksize=blocksize, nested=nested)  # 3.1 blocks of 4096
    packed = pack_state_dict(weight.under("a.weight"))["a.weight"]
    assert (packed.shape, packed.dtype) == ((40, 320), torch.bfloat16)
    assert packed.ggml_type == f"BNB_{quant_type.upper()}"
    assert packed.packed_nbytes == 40 * 320 // 64 * 36
    assert_same_bits(packed.dequantize(dtype), weight.values.to(dtype))


@KINDS
@pytest.mark.parametrize("columns", [64, 48])
def test_rows_of_such_a_weight_are_taken_without_unpacking_it(quant_type, columns):
    """With 48 columns a block lies across rows; every fourth begins with a block."""
    weight = quantized(quant_type, (64, columns))
    packed = pack_state_dict(weight.under("weight.weight"))["weight.weight"]
    rows = packed[16:48]
    assert isinstance(rows, PackedTensor)
    assert rows.packed.data_ptr() == packed.packed.data_ptr() + 16 * columns // 64 * 36
    assert_same_bits(rows.dequantize(torch.float32), weight.values[16:48])
    assert_same_bits(
        torch.cat([rows, packed[:4]]).dequantize(torch.float32), weight.values[[*range(16, 48), *range(4)]]
    )


@KINDS
def test_like_forge_a_value_is_rounded_to_the_dtype_that_the_file_names_first(quant_type):
    weight = quantized(quant_type, dtype="bfloat16")
    packed = pack_state_dict(weight.under("a.weight"))["a.weight"]
    values = packed.dequantize(torch.float16, arithmetic="like Forge", computation_dtype=packed.dtype)
    assert_same_bits(values, weight.values.bfloat16().half())
    assert (values != weight.values.half()).any()


def test_everything_else_in_a_checkpoint_is_passed_on():
    weight = quantized(nested=True)
    plain = {
        name: torch.randn(4) for name in ("a.bias", "norm.weight", "norm.weight.odd", "b.scale_weight", "x")
    }
    packed = pack_state_dict({**plain, **weight.under("a.weight")})
    assert set(packed) == {*plain, "a.weight"}
    assert all(packed[name] is tensor for name, tensor in plain.items())


@pytest.mark.parametrize("field", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_multiplied_by_its_scale_and_not_copied(field, dtype):
    values = torch.randn(8, 16).to(dtype)
    scale = torch.tensor([0.0123])
    tensors = {
        "scaled_fp8": torch.empty(0, dtype=dtype),
        "a.weight": values,
        f"a.{field}": scale,
        "a.scale_input": torch.tensor(1.0),
        "b.weight": values.clone(),
        "b.bias": torch.ones(8),
    }
    packed = pack_state_dict(tensors, torch.float16)
    assert set(packed) == {"a.weight", "b.weight", "b.bias"}
    assert packed["a.weight"].packed.data_ptr() == values.data_ptr()
    assert_same_bits(packed["a.weight"].dequantize(torch.float32), values.float() * scale)
    assert_same_bits(packed["a.weight"].dequantize(), (values.float() * scale).half())
    assert_same_bits(packed["b.weight"].dequantize(torch.float32), values.float())


def changed(field: str, change) -> dict[str, torch.Tensor]:
    """A weight of which one tensor is changed, or left out where the change is to None."""
    tensors = quantized(nested=True).under("a.weight")
    tensors[f"a.weight.{field}"] = change(tensors[f"a.weight.{field}"])
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def with_json(**changes) -> dict[str, torch.Tensor]:
    def change(text):
        fields = {**json.loads(bytes(text.tolist())), **changes}
        kept = {name: value for name, value in fields.items() if value is not ...}
        return torch.frombuffer(bytearray(json.dumps(kept).encode()), dtype=torch.uint8)

    return changed(f"{STATE_KEY}nf4", change)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (changed("quant_map", lambda code: code.flip(0)), "quant_map is not that of nf4"),
        (changed("quant_map", lambda code: code[:15]), "quant_map"),
        (changed("quant_map", lambda code: None), "lacks or garbles 'quant_map'"),
        (changed("absmax", lambda absmax: absmax[1:]), "not 3072 and 95"),
        (changed("absmax", lambda absmax: absmax.float()), "nested statistics do not fit"),
        (changed("nested_absmax", lambda absmax: absmax.repeat(2)), "nested statistics do not fit"),
        (changed("nested_quant_map", lambda code: code[:255]), "nested statistics do not fit"),
        (changed(f"{STATE_KEY}nf4", lambda text: text[1:]), "is not JSON"),
        (changed(f"{STATE_KEY}nf4", lambda text: text.repeat(1000)), "one short text"),
        (changed(f"{STATE_KEY}nf4", lambda text: torch.tensor([48], dtype=torch.uint8)), "JSON object"),
        (with_json(quant_type="int4"), "quantization type is 'int4'"),
        (with_json(blocksize=32), "blocks of 32"),
        (with_json(blocksize=0), "blocks of 0"),
        (with_json(blocksize="many"), "many"),
        (with_json(shape=[2**40, 2**40]), "takes"),
        (with_json(shape=[48, 127]), "6096 elements"),
        (with_json(shape=7), "garbles"),
        (with_json(dtype="int8"), "garbles 'int8'"),
        (with_json(nested_offset=...), "garbles 'nested_offset'"),
        (with_json(nested_blocksize=0), "nested statistics do not fit"),
        ({"a.weight": torch.zeros(4, 8), "a.comfy_quant": torch.zeros(4)}, "ComfyUI"),
        (
            {"a.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(4, 1)},
            "its weight_scale, of shape (4, 1), is not one number",
        ),
        (
            {"a.weight": torch.zeros(4, 8).to(torch.float8_e5m2), "a.scale_weight": torch.tensor(torch.nan)},
            "is not one number",
        ),
        (
            {
                "a.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn),
                "a.weight_scale_inv": torch.ones(1, 1),
            },
            "weight_scale_inv",
        ),
    ],
)
def test_what_cannot_be_unpacked_is_named_with_the_reason(tensors, says):
    with pytest.raises(ValueError, match=r"^a\.(weight|comfy_quant): .*take this model in another") as caught:
        pack_state_dict(tensors)
    assert says in str(caught.value)


def test_a_model_of_such_weights_is_swapped_and_computes_the_same():
    torch.manual_seed(0)
    weights = {
        f"{i}.weight": quantized(("nf4", "fp4")[i % 2], (512, 512), seed=i, nested=i > 1) for i in range(4)
    }
    tensors = {}
    for name, weight in weights.items():
        tensors |= weight.under(name)
    fp8 = (torch.randn(512, 512) / 20).to(torch.float8_e4m3fn)
    tensors |= {"4.weight": fp8, "4.scale_weight": torch.tensor(0.7)}
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(5)))
    model.requires_grad_(False)
    model.load_state_dict(pack_state_dict(tensors, torch.float32), assign=True)
    x = torch.randn(3, 512)
    expected = x
    for weight in [*(weight.values for weight in weights.values()), fp8.float() * 0.7]:
        expected = expected @ weight.T
    attachment = attach(model, device="cpu", budget_bytes=3 << 20)
    with torch.inference_mode():
        first, again = model(x), model(x)
    attachment.detach()
    assert torch.equal(first, again)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-6)

"""Plain types: values that fp32 does not hold are rounded once, and FP8 is its definition times the scale."""

from __future__ import annotations

import copy
import math
import pickle
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from test_unpack_exact import assert_same_bits, fp8_values

from lib_qswap.quant.formats import FORMATS, scaled
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.quant.unpack import unpack

HALVES = {torch.float16: (10, 15), torch.bfloat16: (7, 127)}
"""Mantissa bits and largest exponent."""


def rounded(value: float | int, dtype: torch.dtype) -> float:
    """`value` to the nearest number of `dtype`, to the even one between two, in exact arithmetic."""
    if isinstance(value, float) and (not math.isfinite(value) or value == 0):
        return value
    mantissa_bits, largest = HALVES[dtype]
    exact = abs(Fraction(value))
    if not exact:
        return 0.0
    exponent = max(math.floor(math.log2(exact)), 1 - largest)
    while exact >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exact < Fraction(2) ** exponent and exponent > 1 - largest:
        exponent -= 1
    unit = Fraction(2) ** (exponent - mantissa_bits)
    nearest = round(exact / unit) * unit  # of Fractions: half to even
    magnitude = math.inf if nearest >= Fraction(2) ** (largest + 1) else float(nearest)
    return math.copysign(magnitude, value)


def middles(dtype: torch.dtype) -> list[float]:
    """Numbers in the middle between two of `dtype`, and the nearest fp64 numbers on either side of each."""
    mantissa_bits, largest = HALVES[dtype]
    found = []
    for exponent in (1 - largest - mantissa_bits - 1, 1 - largest, -3, 0, 11, largest):
        for odd in (1, 3, (2 << mantissa_bits) + 1, (4 << mantissa_bits) - 1):
            middle = odd * 2.0 ** (exponent - mantissa_bits - 1)
            for value in (middle, math.nextafter(middle, 0), math.nextafter(middle, math.inf)):
                found += [value, -value]
    return found


def unpacked(name: str, values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(len(values), dtype=dtype)
    return unpack(FORMATS[name], torch.from_numpy(values.view(np.uint8)), out)


@pytest.mark.parametrize("dtype", HALVES)
def test_fp64_is_rounded_once(dtype):
    edges = [0.0, -0.0, math.inf, -math.inf, 5e-324, 1e-40, 1e300, -1e300, 3.4028235677973366e38, 65520.0]
    random = np.frombuffer(np.random.default_rng(0).bytes(8 * 500), np.float64)
    values = [*edges, *middles(dtype), *random[np.isfinite(random)].tolist()]
    expected = torch.tensor([rounded(value, dtype) for value in values], dtype=dtype)
    assert_same_bits(unpacked("F64", np.array(values), dtype), expected)
    assert unpacked("F64", np.array([math.nan, -math.nan]), dtype).isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["I8", "I16", "I32", "I64"])
def test_integers_are_rounded_once(name, dtype):
    kind = np.dtype({"I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8"}[name])
    limits = np.iinfo(kind)
    values = {0, limits.min, limits.max, limits.min + 1, limits.max - 1}
    for bits in range(1, limits.bits - 1):
        # The middle between two numbers of 8 and of 11 bits, with and without something far below it.
        for shift in (8, 11):
            middle = (1 << bits) + (1 << max(bits - shift, 0))
            values |= {middle - 1, middle, middle + 1, 1 - middle, -middle, -1 - middle}
    known = np.array(sorted(v for v in values if limits.min <= v <= limits.max), kind)
    expected = torch.tensor([rounded(int(value), dtype) for value in known], dtype=dtype)
    assert_same_bits(unpacked(name, known, dtype), expected)


def test_rounding_twice_would_show():
    """The values of these tests tell one rounding from two: torch's own conversion fails for some."""
    for dtype in HALVES:
        values = torch.tensor(middles(dtype), dtype=torch.float64)
        once = torch.tensor([rounded(value, dtype) for value in values.tolist()], dtype=dtype)
        assert (values.to(dtype) != once).any()


def test_a_packed_tensor_of_a_plain_type_is_rounded_once_too():
    middle = 1 + 2.0**-8 + 2.0**-40
    packed = torch.tensor([middle], dtype=torch.float64).view(torch.uint8)
    tensor = PackedTensor(packed, FORMATS["F64"], (1,), torch.float64)
    assert tensor.dequantize().item() == middle
    assert tensor.dequantize(torch.bfloat16).item() == 1 + 2.0**-7
    assert (tensor * 1).item() == middle


FP8 = pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
EVERY_BYTE = torch.arange(256, dtype=torch.uint8)


def assert_same(values: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but for which NaN it is."""
    assert torch.equal(values.isnan(), expected.isnan())
    assert_same_bits(
        values.nan_to_num(0, torch.inf, -torch.inf), expected.nan_to_num(0, torch.inf, -torch.inf)
    )


@FP8
@DTYPES
def test_every_byte_is_the_number_that_the_format_defines_and_torch_casts_it_to(name, dtype):
    values = unpack(FORMATS[name], EVERY_BYTE, torch.empty(256, dtype=dtype))
    assert_same(values, torch.from_numpy(fp8_values(name)).to(dtype))
    assert_same(values, EVERY_BYTE.view(FORMATS[name].dtype).to(dtype))


@FP8
@DTYPES
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 0.0004371, 1 / 3, -2.5, 448.0, 3.4028234663852886e38])
def test_every_byte_times_a_scale_is_one_fp32_product_rounded_once(name, dtype, scale):
    scale = struct.unpack("f", struct.pack("f", scale))[0]
    with np.errstate(all="ignore"):
        products = fp8_values(name) * np.float32(scale)
    values = unpack(scaled(name, scale), EVERY_BYTE, torch.empty(256, dtype=dtype))
    assert_same(values, torch.from_numpy(products).to(dtype))


@FP8
@pytest.mark.parametrize("scale", [0.0004371, 1 / 3, 448.0])
@pytest.mark.parametrize("computation_dtype", [torch.float16, torch.bfloat16])
def test_like_forge_the_scale_is_rounded_first(name, scale, computation_dtype):
    weight = EVERY_BYTE.view(FORMATS[name].dtype).to(computation_dtype)
    expected = weight * torch.tensor(scale).to(computation_dtype)
    out = torch.empty(256, dtype=torch.float32)
    unpack(scaled(name, scale), EVERY_BYTE, out, arithmetic="like Forge", computation_dtype=computation_dtype)
    assert_same(out, expected.float())


@FP8
def test_a_packed_tensor_keeps_its_scale_wherever_it_goes(name):
    format = scaled(name, 0.125)
    tensor = PackedTensor(EVERY_BYTE[:96], format, (6, 16), torch.bfloat16)
    assert tensor[2:4].format is format
    assert tensor.clone().format is format
    assert torch.cat([tensor, tensor]).format is format
    assert torch.equal(tensor[2:4].dequantize(), tensor.dequantize()[2:4])
    for again in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))):
        assert again.format is format
        assert torch.equal(again.dequantize(), tensor.dequantize())
    other = PackedTensor(EVERY_BYTE[:96], scaled(name, 0.5), (6, 16), torch.bfloat16)
    joined = torch.cat([tensor, other])
    assert not isinstance(joined, PackedTensor)
    assert torch.equal(joined, torch.cat([tensor.dequantize(), other.dequantize()]))

"""Triton's kernels on a real GPU: compiled, they give the bits of torch's operations on the CPU."""

from __future__ import annotations

import ggml_blocks
import pytest
import torch

from lib_qswap.quant import kernels, multiply, multiply_lanes
from lib_qswap.quant.formats import FORMATS
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.quant.unpack import unpack, unpack_with_torch


def _gpu() -> str | None:
    if torch.cuda.is_available():
        return "cuda"
    return "xpu" if hasattr(torch, "xpu") and torch.xpu.is_available() else None


GPU = _gpu()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPU is None, reason="PyTorch finds no GPU here")]

BLOCK_TYPES = [row for row in FORMATS.values() if row.unpack and row.dtype is None]
EVERY_TYPE = pytest.mark.parametrize("format", BLOCK_TYPES, ids=lambda row: row.name)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.fixture(autouse=True)
def triton_serves_this_gpu():
    reason = kernels.why_not_triton(GPU)
    if reason is not None:
        pytest.skip(f"Triton does not unpack here: {reason}")


def by_triton(format, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.full((len(packed), format.block_elements), torch.nan, dtype=dtype, device=GPU)
    kernels.load(format).unpack(packed, out, format.block_elements)
    return out


def assert_same_bits(values: torch.Tensor, expected: torch.Tensor) -> None:
    bits = BITS[values.dtype]
    torch.testing.assert_close(values.cpu().view(bits), expected.view(bits), rtol=0, atol=0)


@EVERY_TYPE
@pytest.mark.parametrize("scales", ["any", "ordinary", "edge", "zero"])
def test_compiled_kernels_give_the_bits_of_torchs_operations(format, scales):
    blocks = torch.from_numpy(ggml_blocks.random_blocks(format, 4096 + 3, scales))
    for dtype in BITS:
        expected = unpack(format, blocks, torch.empty(len(blocks), format.block_elements, dtype=dtype))
        assert_same_bits(by_triton(format, blocks.to(GPU), dtype), expected)


@pytest.mark.parametrize(
    "format", [row for row in BLOCK_TYPES if row.unpack_like_forge], ids=lambda row: row.name
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_compiled_kernels_give_the_bits_of_torchs_operations_in_forges_arithmetic(format, dtype):
    blocks = torch.from_numpy(ggml_blocks.random_blocks(format, 4096 + 3, "ordinary"))
    for out_dtype in BITS:
        expected = torch.empty(len(blocks), format.block_elements, dtype=out_dtype)
        unpack_with_torch(format, blocks, expected, dtype)
        out = torch.full_like(expected, torch.nan, device=GPU)
        assert kernels.unpack_with_triton(format, blocks.to(GPU), out, dtype)
        assert_same_bits(out, expected)


@EVERY_TYPE
def test_rows_that_begin_anywhere_in_a_tensor_are_unpacked(format):
    blocks = torch.from_numpy(ggml_blocks.random_blocks(format, 67, "ordinary"))
    whole = unpack(format, blocks, torch.empty(67, format.block_elements))
    on_gpu = blocks.to(GPU)
    for first in (1, 2, 3, 8, 66):
        assert_same_bits(by_triton(format, on_gpu[first:], torch.float32), whole[first:])


def test_unpack_takes_the_kernels_and_they_neither_allocate_nor_synchronize():
    if GPU != "cuda":
        pytest.skip("only CUDA reports what synchronizes")
    for format in BLOCK_TYPES:
        packed = torch.from_numpy(ggml_blocks.random_blocks(format, 4096, "ordinary")).to(GPU)
        out = torch.empty(4096 * format.block_elements, dtype=torch.bfloat16, device=GPU)
        unpack(format, packed, out)  # compiles, and puts the type's table on the device
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            unpack(format, packed, out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before, format.name
    assert kernels.in_use(GPU) == "Triton"


def test_more_than_two_billion_values_are_unpacked():
    format = FORMATS["Q8_0"]
    count = (1 << 31) // 32 + 128
    needed = count * (format.block_bytes + 64)
    module = getattr(torch, GPU)
    if module.mem_get_info()[0] < needed + (1 << 30):
        pytest.skip(f"needs {needed >> 20} MB of free device memory")
    some = torch.from_numpy(ggml_blocks.random_blocks(format, 128, "ordinary"))
    packed = torch.zeros((count, format.block_bytes), dtype=torch.uint8, device=GPU)
    packed[-128:] = some.to(GPU)
    values = by_triton(format, packed, torch.float16)
    expected = unpack(format, some, torch.empty(128, 32, dtype=torch.float16))
    assert_same_bits(values[-128:], expected)
    assert not values[:-128].any()


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("rows", [3072 + 3, 9216 + 3])
@EVERY_TYPE
def test_a_compiled_product_is_at_least_as_accurate_as_one_with_the_unpacked_weight(format, rows, tokens):
    elements = 3072
    blocks = torch.from_numpy(ggml_blocks.random_blocks(format, 4096, "ordinary"))
    count = rows * elements // format.block_elements
    packed = blocks.repeat(-(-count // 4096), 1)[:count].reshape(rows, -1).to(GPU)
    weight = PackedTensor(packed, format, (rows, elements), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((tokens, elements), generator=generator).bfloat16().to(GPU)
    bias = torch.randn(rows, generator=generator).to(GPU)
    assert multiply.serves(weight, x)
    by_lanes = multiply_lanes.multiply_for(format, packed, x, rows)
    assert (by_lanes is not None) == (format.name in multiply_lanes.LANES)
    values = multiply.product(weight, x, bias)
    assert not kernels._without_lanes
    assert not kernels._given_up
    exact = torch.nn.functional.linear(x.double(), weight.dequantize(torch.float32).double(), bias.double())
    unpacked = torch.nn.functional.linear(x, weight.dequantize(), bias.bfloat16())
    assert (values - exact).abs().max() <= (unpacked - exact).abs().max()
    assert torch.equal(values, multiply.product(weight, x, bias))


def test_a_tensor_on_another_gpu_than_the_current_one_is_unpacked():
    if getattr(torch, GPU).device_count() < 2:
        pytest.skip("needs two GPUs")
    format = FORMATS["Q4_K"]
    blocks = torch.from_numpy(ggml_blocks.random_blocks(format, 5, "ordinary"))
    out = torch.empty(5, 256, device=f"{GPU}:1")
    assert kernels.unpack_with_triton(format, blocks.to(f"{GPU}:1"), out)
    assert_same_bits(out, unpack(format, blocks, torch.empty(5, 256)))

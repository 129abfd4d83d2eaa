"""What `test_unpack_triton` runs in a process of its own, where Triton interprets its kernels on the CPU."""

from __future__ import annotations

import ggml_blocks
import pytest
import torch

from lib_qswap.quant import kernels
from lib_qswap.quant.formats import FORMATS
from lib_qswap.quant.unpack import unpack

BLOCK_TYPES = [row for row in FORMATS.values() if row.unpack is not None and row.dtype is None]
EVERY_TYPE = pytest.mark.parametrize("format", BLOCK_TYPES, ids=lambda row: row.name)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# What a program unpacks; a few elements more are no multiple of it.
TILE_ELEMENTS = 4096


@pytest.fixture(autouse=True)
def triton_chosen():
    kernels.choose("Triton")
    yield
    kernels.choose("Auto")


def by_torch(format, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    kernels.choose("Torch")
    try:
        return unpack(format, packed, torch.empty(len(packed), format.block_elements, dtype=dtype))
    finally:
        kernels.choose("Triton")


def by_triton(format, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In a buffer whose rest must stay as it is."""
    elements = len(packed) * format.block_elements
    buffer = torch.full((elements + 512,), torch.nan, dtype=dtype)
    out = buffer[256 : 256 + elements].view(len(packed), format.block_elements)
    assert kernels.unpack_with_triton(format, packed, out)
    assert buffer[:256].isnan().all()
    assert buffer[256 + elements :].isnan().all()
    return out


def assert_same_bits(values: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, the sign of zero included."""
    bits = BITS[values.dtype]
    torch.testing.assert_close(values.view(bits), expected.view(bits), rtol=0, atol=0)


@EVERY_TYPE
@pytest.mark.parametrize("scales", ["any", "ordinary", "edge", "zero"])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # to infinity, in fp16
def test_values_are_those_of_torch_bit_for_bit_in_every_dtype(format, scales):
    # Every pair of edges where there are two scales.
    count = 14 * 14 if scales == "edge" else 2 * TILE_ELEMENTS // format.block_elements
    packed = torch.from_numpy(ggml_blocks.random_blocks(format, count + 3, scales, seed=1))
    for dtype in BITS:
        assert_same_bits(by_triton(format, packed, dtype), by_torch(format, packed, dtype))


@EVERY_TYPE
def test_any_number_of_blocks_is_unpacked_and_nothing_else_is_written(format):
    tile = TILE_ELEMENTS // format.block_elements
    blocks = torch.from_numpy(ggml_blocks.random_blocks(format, tile + 1, "ordinary"))
    for count in (1, 2, tile - 1, tile, tile + 1):
        packed = blocks[:count].clone()
        assert_same_bits(by_triton(format, packed, torch.float32), by_torch(format, packed, torch.float32))
    assert unpack(format, blocks[:0], torch.empty(0)).numel() == 0


def one_product_each(products: list[float]) -> torch.Tensor:
    """Q8_K blocks whose first value is a product, the others 0."""
    packed = torch.zeros((len(products), FORMATS["Q8_K"].block_bytes), dtype=torch.uint8)
    packed[:, :4] = torch.tensor(products).view(torch.uint8).view(-1, 4)
    packed[:, 4] = 1
    return packed


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_what_lies_halfway_is_rounded_to_even_and_what_lies_beside_it_to_the_nearest(dtype, digits):
    half, least = 2.0**-digits, 2.0**-23
    products = [sign * (1 + step * half + beside) for sign in (1, -1)
                for step in (1, 3) for beside in (-least, 0.0, least)]  # fmt: skip
    expected = [sign * (1 + step * half) for sign in (1, -1) for step in (0, 0, 2, 2, 4, 4)]
    values = by_triton(FORMATS["Q8_K"], one_product_each(products), dtype)[:, 0]
    assert values.tolist() == expected


def test_numbers_too_small_for_a_normal_fp32_are_kept():
    products = [2.0**-149, 3 * 2.0**-140, -(2.0**-127)]
    values = by_triton(FORMATS["Q8_K"], one_product_each(products), torch.float32)[:, 0]
    assert values.tolist() == products


@pytest.fixture
def launches(monkeypatch):
    """The names of the types that Triton unpacked."""
    names = []
    original = kernels.unpack_with_triton

    def counted(format, packed, out):
        done = original(format, packed, out)
        names.extend([format.name] * done)
        return done

    monkeypatch.setattr(kernels, "unpack_with_triton", counted)
    return names


def test_unpack_takes_triton_for_exact_arithmetic_and_torch_for_forges(launches):
    format = FORMATS["Q4_K"]
    packed = torch.from_numpy(ggml_blocks.random_blocks(format, 5, "ordinary"))
    out = torch.empty(5, 256, dtype=torch.float16)
    unpack(format, packed, out)
    assert launches == ["Q4_K"]
    unpack(format, packed, out, arithmetic="like Forge")
    kernels.choose("Torch")
    unpack(format, packed, out)
    assert launches == ["Q4_K"]
    kernels.choose("Auto")
    unpack(format, packed, out)
    assert launches == ["Q4_K", "Q4_K"]


def test_blocks_at_an_address_that_a_kernel_cannot_read_are_unpacked_by_torch(launches):
    format = FORMATS["Q4_K"]
    blocks = torch.from_numpy(ggml_blocks.random_blocks(format, 5, "ordinary"))
    odd = torch.empty(blocks.numel() + 1, dtype=torch.uint8)[1:].view(5, -1)
    odd.copy_(blocks)
    out = unpack(format, odd, torch.empty(5, 256))
    assert launches == []
    assert_same_bits(out, by_triton(format, blocks, torch.float32))

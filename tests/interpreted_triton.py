"""What `test_unpack_triton` runs in a process of its own, where Triton interprets its kernels on the CPU."""

from __future__ import annotations

from functools import partial

import ggml_blocks
import pytest
import torch

from lib_qswap.quant import kernel_check, kernels, multiply, multiply_lanes, multiply_triton
from lib_qswap.quant.formats import FORMATS
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.quant.unpack import unpack, unpack_with_torch
from lib_qswap.swap import inventory
from lib_qswap.swap.manager import attach

BLOCK_TYPES = [row for row in FORMATS.values() if row.unpack and row.dtype is None]
EVERY_TYPE = pytest.mark.parametrize("format", BLOCK_TYPES, ids=lambda row: row.name)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# A multiple of what a program unpacks; a few elements more are none.
TILE_ELEMENTS = 4096


@pytest.fixture(autouse=True)
def triton_chosen():
    kernels.choose("Triton")
    yield
    kernels.choose("Auto")


def number_of_blocks(format, scales: str) -> int:
    """Two programs and a part, or every pair of edges where there are two scales. Each program takes time."""
    if scales != "edge":
        return 2 * TILE_ELEMENTS // format.block_elements + 3
    edges = len(ggml_blocks.EDGE_SCALES) ** len(ggml_blocks.HALF_OFFSETS.get(format.name, (0,)))
    return max(edges, TILE_ELEMENTS // format.block_elements) + 3


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
    packed = torch.from_numpy(
        ggml_blocks.random_blocks(format, number_of_blocks(format, scales), scales, seed=1)
    )
    for dtype in BITS:
        assert_same_bits(by_triton(format, packed, dtype), by_torch(format, packed, dtype))


@pytest.mark.parametrize(
    "format", [row for row in BLOCK_TYPES if row.unpack_like_forge], ids=lambda row: row.name
)
@pytest.mark.parametrize("scales", ["any", "ordinary", "edge"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_values_in_forges_arithmetic_are_those_of_torch_bit_for_bit(format, scales, dtype):
    packed = torch.from_numpy(
        ggml_blocks.random_blocks(format, number_of_blocks(format, scales), scales, seed=1)
    )
    for out_dtype in BITS:
        values = torch.empty(len(packed), format.block_elements, dtype=out_dtype)
        assert kernels.unpack_with_triton(format, packed, values, dtype)
        expected = unpack_with_torch(format, packed, torch.empty_like(values), dtype)
        # Bits of what is not a number are nobody's.
        bits = BITS[out_dtype]
        same = (values.view(bits) == expected.view(bits)) | (values.isnan() & expected.isnan())
        assert same.all()


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

    def counted(format, packed, out, dtype=torch.float32):
        done = original(format, packed, out, dtype)
        names.extend([format.name] * done)
        return done

    monkeypatch.setattr(kernels, "unpack_with_triton", counted)
    return names


def test_unpack_takes_triton_for_both_arithmetics_unless_torch_was_chosen(launches):
    format = FORMATS["Q4_K"]
    packed = torch.from_numpy(ggml_blocks.random_blocks(format, 5, "ordinary"))
    out = torch.empty(5, 256, dtype=torch.float16)
    unpack(format, packed, out)
    assert launches == ["Q4_K"]
    unpack(format, packed, out, arithmetic="like Forge")
    assert launches == ["Q4_K", "Q4_K"]
    kernels.choose("Torch")
    unpack(format, packed, out)
    assert launches == ["Q4_K", "Q4_K"]
    kernels.choose("Auto")
    unpack(format, packed, out)
    assert launches == ["Q4_K", "Q4_K", "Q4_K"]


def test_blocks_at_an_address_that_a_kernel_cannot_read_are_unpacked_by_torch(launches):
    format = FORMATS["Q4_K"]
    blocks = torch.from_numpy(ggml_blocks.random_blocks(format, 5, "ordinary"))
    odd = torch.empty(blocks.numel() + 1, dtype=torch.uint8)[1:].view(5, -1)
    odd.copy_(blocks)
    out = unpack(format, odd, torch.empty(5, 256))
    assert launches == []
    assert_same_bits(out, by_triton(format, blocks, torch.float32))


def packed_weight(name: str, rows: int, elements: int) -> PackedTensor:
    format = FORMATS[name]
    blocks = ggml_blocks.random_blocks(format, rows * elements // format.block_elements, "ordinary")
    return PackedTensor(torch.from_numpy(blocks).view(rows, -1), format, (rows, elements))


def largest_error(values: torch.Tensor, expected: torch.Tensor) -> float:
    return float((values.double() - expected).abs().max())


@pytest.mark.parametrize("name", [*multiply_lanes.LANES, "IQ2_S", "IQ4_XS", "MXFP4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_of_few_tokens_is_at_least_as_accurate_as_one_with_the_unpacked_weight(
    name, dtype, monkeypatch
):
    # Their checks take longer than the products, and have a test of their own.
    monkeypatch.setattr(kernel_check, "check_product", lambda *arguments: None)
    monkeypatch.setattr(kernels, "_checked", set())
    generator = torch.Generator().manual_seed(0)
    for tokens, rows, elements in ((1, 1, 256), (2, 3, 768), (1, 5, 1280)):
        weight = packed_weight(name, rows, elements)
        x = torch.randn((tokens, 1, elements), generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator)
        assert multiply.serves(weight, x)
        by_lanes = multiply_lanes.multiply_for(weight.format, weight.packed, x.view(tokens, -1), rows)
        assert (by_lanes is not None) == (name in multiply_lanes.LANES)
        values = multiply.product(weight, x, bias)
        assert not kernels._without_lanes
        assert (values.shape, values.dtype) == ((tokens, 1, rows), dtype)
        exact = torch.nn.functional.linear(
            x.double(), weight.dequantize(torch.float32).double(), bias.double()
        )
        unpacked = torch.nn.functional.linear(x, weight.dequantize(dtype), bias.to(dtype))
        # Of the terms in fp32, and of the sum in the end.
        terms = torch.nn.functional.linear(x.double().abs(), weight.dequantize(torch.float32).double().abs())
        rounding = float(terms.max()) * 2.0**-22 + float(exact.abs().max()) * torch.finfo(dtype).eps
        assert largest_error(values, exact) <= rounding
        if dtype != torch.float32:
            assert largest_error(values, exact) <= largest_error(unpacked, exact)
        if rows == 1:
            exact -= bias.double()
            rounding = float(terms.max()) * 2.0**-22 + float(exact.abs().max()) * torch.finfo(dtype).eps
            assert largest_error(multiply.product(weight, x, None), exact) <= rounding


def test_a_product_that_is_wrong_in_one_row_is_left_to_torch(monkeypatch):
    original = multiply_triton.multiply

    def wrong(kernel, format, packed, inputs, bias, out):
        original(kernel, format, packed, inputs, bias, out)
        out[:, 1] += 0.01 * out[:, 1].abs()

    told = []
    monkeypatch.setattr(kernels, "_given_up", set())
    monkeypatch.setattr(kernels, "_checked", set())
    monkeypatch.setattr(kernels, "_listener", told.append)
    monkeypatch.setattr(multiply_triton, "multiply", wrong)
    weight = packed_weight("IQ4_NL", 4, 512)
    assert multiply.product(weight, torch.ones(1, 512), None) is None
    assert not multiply.serves(weight, torch.ones(1, 512))
    assert "IQ4_NL in products" in told[0]


@pytest.fixture
def told(monkeypatch):
    """What is said, of kernels of which nothing is known."""
    told = []
    monkeypatch.setattr(kernels, "_given_up", set())
    monkeypatch.setattr(kernels, "_without_lanes", set())
    monkeypatch.setattr(kernels, "_checked", set())
    monkeypatch.setattr(kernels, "_listener", told.append)
    kernels._say_once.cache_clear()
    yield told
    kernels._say_once.cache_clear()


def test_a_product_by_lanes_that_is_wrong_is_made_by_the_kernel_of_every_type(told, monkeypatch):
    original, calls = multiply_lanes.multiply, []

    def wrong(lanes, at_once, format, packed, inputs, bias, out):
        calls.append(at_once)
        original(lanes, at_once, format, packed, inputs, bias, out)
        out[:, 1] += 0.01 * out[:, 1].abs()

    monkeypatch.setattr(multiply_lanes, "multiply", wrong)
    weight, x = packed_weight("Q5_0", 4, 512), torch.ones(1, 512)
    exact = torch.nn.functional.linear(x.double(), weight.dequantize(torch.float32).double())
    for _ in range(2):
        torch.testing.assert_close(multiply.product(weight, x, None).double(), exact, rtol=1e-5, atol=1e-4)
    assert calls == [2], "it is not tried again"
    assert multiply.serves(weight, x)
    assert kernels.in_use("cpu") == "Triton"
    (text,) = told
    assert "Q5_0 is multiplied more slowly" in text


def test_a_kernel_that_had_no_room_once_is_tried_again(told, monkeypatch):
    original, calls = multiply_lanes.multiply, []

    def full(*arguments):
        calls.append(arguments[1])
        if len(calls) == 1:
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        original(*arguments)

    monkeypatch.setattr(multiply_lanes, "multiply", full)
    weight, x = packed_weight("Q4_K", 4, 512), torch.ones(1, 512)
    values = [multiply.product(weight, x, None) for _ in range(2)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-4)
    assert len(calls) == 3, "its check, the check again, and the product"
    assert told == []


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q4_K", "Q2_K"])
def test_rows_whose_words_lie_askew_are_left_to_the_kernel_of_every_type(name):
    format = FORMATS[name]
    for blocks, shift in ((3, 0), (2, 2)):
        elements = blocks * format.block_elements
        weight = packed_weight(name, 5, elements)
        moved = torch.empty(weight.packed.numel() + shift, dtype=torch.uint8)[shift:]
        moved = moved.view(5, -1).copy_(weight.packed.view(5, -1))
        x = torch.randn((1, elements), generator=torch.Generator().manual_seed(0))
        lanes = multiply_lanes.LANES[name]
        askew = shift or format.packed_bytes(elements) % lanes.alignment
        assert (multiply_lanes.multiply_for(format, moved, x, 5) is None) == bool(askew)
        values = kernels.product_with_triton(format, moved, x, None, 5)
        if shift % kernels.load(format).alignment:
            assert values is None
        else:
            exact = torch.nn.functional.linear(x.double(), weight.dequantize(torch.float32).double())
            torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", multiply_lanes.LANES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_inputs_among_small_ones_cost_a_product_no_accuracy(name, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = packed_weight(name, 16, 1024)
    x = torch.randn((1, 1024), generator=generator) * 0.05
    x[0, ::97] = 300
    x = x.to(dtype)
    exact_weight = weight.dequantize(torch.float32).double()
    exact = torch.nn.functional.linear(x.double(), exact_weight)
    unpacked = torch.nn.functional.linear(x.double(), weight.dequantize(dtype).double()).to(dtype)
    terms = torch.nn.functional.linear(x.double().abs(), exact_weight.abs())
    values = multiply.product(weight, x, None)
    # Half of the last digit is the result's own.
    error = (values.double() - exact).abs() - exact.abs() * torch.finfo(dtype).eps / 2
    assert (error / terms).max() < 1e-6
    assert (values - exact).abs().mean() <= (unpacked - exact).abs().mean()


def test_inputs_and_biases_that_begin_anywhere_are_multiplied():
    weight = packed_weight("Q4_K", 8, 512)
    x = torch.randn(1 + 512, generator=torch.Generator().manual_seed(0))[1:].view(1, 512)
    bias = torch.randn(8 + 1)[1:]
    exact = torch.nn.functional.linear(x.double(), weight.dequantize(torch.float32).double(), bias.double())
    torch.testing.assert_close(multiply.product(weight, x, bias).double(), exact, rtol=1e-5, atol=1e-4)


@EVERY_TYPE
@pytest.mark.parametrize(
    ("dtype", "biased"), [(torch.bfloat16, True), (torch.float16, False), (torch.float32, True)]
)
def test_a_right_product_passes_its_check(format, dtype, biased):
    kernel = kernels.load(format)
    bias = torch.ones(8, dtype=dtype) if biased else None
    for tokens, address in ((1, 0), (2, kernel.alignment)):
        inputs = torch.ones((tokens, 256), dtype=dtype)
        kernel_check.check_product(partial(multiply_triton.multiply, kernel), format, address, inputs, bias)


@pytest.mark.parametrize("name", multiply_lanes.LANES)
@pytest.mark.parametrize(("tokens", "at_once"), [(1, 4), (1, 2), (2, 2), (2, 1)])
def test_a_product_by_lanes_passes_its_check_with_any_number_of_rows_at_once(name, tokens, at_once):
    inputs, bias = torch.ones((tokens, 256), dtype=torch.bfloat16), torch.ones(8)
    lanes = multiply_lanes.LANES[name]
    product = partial(multiply_lanes.multiply, lanes, at_once)
    kernel_check.check_product(product, FORMATS[name], lanes.alignment, inputs, bias)


def test_only_what_a_kernel_can_multiply_is_taken_from_torch():
    weight = packed_weight("Q4_K", 8, 512)
    assert multiply.serves(weight, torch.ones(2, 512))
    assert multiply.serves(weight, torch.ones(1, 1, 512))
    assert not multiply.serves(weight, torch.ones(3, 512))
    assert not multiply.serves(weight, torch.ones(0, 512))
    assert not multiply.serves(weight, torch.ones(1, 256))
    assert not multiply.serves(weight, torch.ones(1, 512, dtype=torch.float64))
    assert not multiply.serves(weight, torch.ones(1, 512, requires_grad=True))
    assert not multiply.serves(weight.dequantize(), torch.ones(1, 512))
    assert not multiply.serves(packed_weight("F16", 8, 512), torch.ones(1, 512))
    # Rows that are no whole number of blocks.
    flat = torch.from_numpy(ggml_blocks.random_blocks(FORMATS["Q4_K"], 4, "ordinary")).view(-1)
    assert not multiply.serves(PackedTensor(flat, FORMATS["Q4_K"], (8, 128)), torch.ones(1, 128))
    kernels.choose("Torch")
    assert not multiply.serves(weight, torch.ones(1, 512))


class SideBySide(torch.nn.ModuleList):
    """One input for all layers: few rows, each of which takes the interpreter time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self], -1)


@pytest.mark.parametrize("arithmetic", ["exact", "like Forge"])
def test_a_layer_of_one_token_gives_the_same_bits_resident_and_swapped(arithmetic, monkeypatch):
    products = []
    original = kernels.product_with_triton
    monkeypatch.setattr(
        kernels,
        "product_with_triton",
        lambda format, *rest: products.append(format) or original(format, *rest),
    )
    monkeypatch.setattr(inventory, "FIXED_BELOW_BYTES", 1024)
    x = torch.randn((1, 512), generator=torch.Generator().manual_seed(0)).bfloat16()
    outputs = []
    for budget_bytes in (1 << 30, 0):
        layers = [torch.nn.Linear(512, 8) for _ in range(6)]
        for layer in layers:
            packed = packed_weight("Q4_K", *layer.weight.shape)
            layer.weight = torch.nn.Parameter(packed, requires_grad=False)
            layer.bias = torch.nn.Parameter(torch.ones(layer.out_features), requires_grad=False)
        model = SideBySide(layers)
        attachment = attach(
            model,
            device="cpu",
            location="cpu",
            budget_bytes=budget_bytes,
            arithmetic=arithmetic,
            compute_dtype=torch.bfloat16,
        )
        resident = {layer.resident is not None for layer in attachment.layers}
        assert resident == {budget_bytes > 0}
        with torch.no_grad():
            outputs.append(model(x))
        attachment.detach()
    assert_same_bits(*outputs)
    assert len(products) == (12 if arithmetic == "exact" else 0)


def test_a_backward_pass_reads_the_weights_of_its_forward():
    """A kernel tells autograd nothing of what it writes over."""
    q8_0 = FORMATS["Q8_0"]
    blocks = [ggml_blocks.random_blocks(q8_0, 256 * 256 // 32, "ordinary", seed) for seed in range(3)]
    packed = [PackedTensor(torch.from_numpy(one).view(256, -1), q8_0, (256, 256)) for one in blocks]
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False, device="meta") for _ in packed))
    for layer, weight in zip(model, packed, strict=True):
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    own, ours = (torch.linspace(-1, 1, 1024).view(4, 256).requires_grad_(True) for _ in range(2))
    x = own
    for weight in packed:
        x = torch.nn.functional.linear(x, weight.dequantize(torch.float32))
    x.sum().backward()
    attachment = attach(model, device="cpu", location="cpu", budget_bytes=0, compute_dtype=torch.float32)
    model(ours).sum().backward()
    attachment.detach()
    assert torch.equal(ours.grad, own.grad)

"""Layers of one or two tokens: who computes them, and what happens when their kernel fails."""

from __future__ import annotations

import ggml_blocks
import pytest
import torch

from lib_qswap.forge import forward, managed
from lib_qswap.quant import kernels
from lib_qswap.quant.formats import FORMATS
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.swap.manager import attach

FORMAT = FORMATS["Q8_0"]


@pytest.fixture
def products(monkeypatch):
    """A kernel on the CPU that multiplies, until its `fails` is set; the number of tokens of each product."""

    class Products(list):
        fails = False

    made = Products()

    def product(format, packed, inputs, bias, rows):
        made.append(len(inputs))
        if made.fails:
            return None
        weight = PackedTensor(packed, format, (rows, inputs.shape[1])).dequantize(inputs.dtype)
        return torch.nn.functional.linear(inputs, weight, bias) + 100

    monkeypatch.setattr(kernels, "has_product", lambda format, device: True)
    monkeypatch.setattr(kernels, "product_with_triton", product)
    return made


def layer() -> torch.nn.Linear:
    linear = torch.nn.Linear(512, 256)
    packed = torch.from_numpy(ggml_blocks.random_blocks(FORMAT, 256 * 16, "ordinary"))
    linear.weight = torch.nn.Parameter(PackedTensor(packed, FORMAT, (256, 512)), requires_grad=False)
    linear.bias.requires_grad_(False)
    return linear


@pytest.fixture(params=["exact", "like Forge"])
def attached(request):
    model = torch.nn.Sequential(layer())
    attachment = attach(model, device="cpu", arithmetic=request.param, compute_dtype=torch.float32)
    yield model, attachment
    attachment.detach()


def expected(linear, x):
    weight = linear.weight.dequantize(torch.float32)
    return torch.nn.functional.linear(x, weight, linear.bias)


@torch.no_grad()
def test_one_or_two_tokens_are_multiplied_by_the_kernel_in_exact_arithmetic_only(attached, products):
    model, attachment = attached
    exact = attachment.arithmetic == "exact"
    for tokens, by_kernel in ((1, exact), (2, exact), (3, False)):
        x = torch.randn(tokens, 1, 512)
        offset = 100 if by_kernel else 0
        torch.testing.assert_close(model(x), expected(model[0], x) + offset)
    assert products == ([1, 2] if exact else [])


@torch.no_grad()
def test_a_product_whose_kernel_fails_is_computed_all_the_same(products):
    products.fails = True
    model = torch.nn.Sequential(layer())
    attachment = attach(model, device="cpu", compute_dtype=torch.float32)
    x = torch.randn(1, 512)
    torch.testing.assert_close(model(x), expected(model[0], x))
    assert products == [1]
    attachment.detach()


def forges(attached, monkeypatch):
    """The layer as Forge has it, served by `attached`."""
    model, attachment = attached
    monkeypatch.setattr(managed, "managed_layer", lambda module, device: (attachment, attachment.layers[0]))
    return model[0], attachment


@torch.no_grad()
def test_forges_layers_are_multiplied_by_the_kernel_as_well(attached, products, monkeypatch):
    linear, attachment = forges(attached, monkeypatch)
    x = torch.randn(1, 512)
    product = forward._product(linear, x)
    if attachment.arithmetic == "exact":
        torch.testing.assert_close(product, expected(linear, x) + 100)
    else:
        assert product is None
    assert forward._product(linear, torch.randn(3, 512)) is None


@torch.no_grad()
def test_a_layer_with_a_lora_on_it_is_unpacked(attached, products, monkeypatch):
    linear, _ = forges(attached, monkeypatch)
    linear.forge_online_loras = {"weight": [object()]}
    assert forward._product(linear, torch.randn(1, 512)) is None
    assert products == []


@torch.no_grad()
def test_a_layer_that_qswap_does_not_manage_is_left_to_forge(products, monkeypatch):
    monkeypatch.setattr(managed, "managed_layer", lambda module, device: None)
    assert forward._product(layer(), torch.randn(1, 512)) is None
    assert products == []


def test_a_product_that_fails_leaves_unpacking_to_triton(monkeypatch):
    told = []
    monkeypatch.setattr(kernels, "_given_up", set())
    monkeypatch.setattr(kernels, "_listener", told.append)
    monkeypatch.setattr(kernels, "why_not_triton", lambda device_type: None)
    monkeypatch.setattr(kernels, "load", lambda format: type("Kernel", (), {"alignment": 1})())
    kernels._say_once.cache_clear()
    packed = torch.zeros((32, 68), dtype=torch.uint8)
    assert kernels.has_product(FORMAT, torch.device("cpu"))
    # There is no GPU to launch on, or no Triton at all.
    assert kernels.product_with_triton(FORMAT, packed, torch.ones(1, 64), None, 32) is None
    assert not kernels.has_product(FORMAT, torch.device("cpu"))
    assert len(told) == 1
    assert kernels.in_use("cpu") == "Triton, Torch for Q8_0 in products"
    kernels._say_once.cache_clear()

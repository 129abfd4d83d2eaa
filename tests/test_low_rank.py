"""LoRAs in Forge's form, added to an unpacked weight in one pass over it."""

from __future__ import annotations

import pytest
import torch

from lib_qswap.forge.low_rank import add_in_place

ROWS, COLUMNS, RANK = 96, 64, 8
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def lora(rows=ROWS, columns=COLUMNS, *, rank=RANK, alpha=None, middle=None, dora_scale=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(shape, generator=generator) * 0.1 for shape in ((rows, rank), (rank, columns)))
    return "lora", (up, down, alpha, middle, dora_scale)


def patch(value, strength=1.0, *, weight_strength=1.0, part=None, function=None):
    return [strength, value, weight_strength, part, function]


def weight_of(dtype, rows=ROWS, columns=COLUMNS):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(9)).to(dtype)


def summed(weight, value, scale):
    """In double precision, of the matrices as the weight's dtype holds them."""
    up, down = (one.to(weight.dtype).double() for one in value[1][:2])
    return weight.double() + scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "scale"), [(None, 0.75), (4.0, 0.375)])
def test_product_and_sum_are_rounded_once(dtype, alpha, scale, device):
    weight, value = weight_of(dtype), lora(alpha=alpha)
    right = summed(weight, value, scale)
    weight = weight.to(device)
    where = weight.data_ptr()
    assert add_in_place(weight, [patch(value, 0.75)])
    assert weight.data_ptr() == where
    weight = weight.cpu()
    # A sum in fp32 may be rounded the other way where it lies half way.
    error = (weight.double() - right).abs()
    half = (right.abs() * torch.finfo(dtype).eps / 2).clamp(min=1e-7)
    assert (error <= half * (1.01 if dtype != torch.float32 else 8)).all()


def test_several_are_added_one_after_the_other():
    weight, values = weight_of(torch.float32), [lora(seed=1), lora(rank=3, seed=2)]
    right = summed(summed(weight, values[0], 0.5).float(), values[1], -2.0)
    assert add_in_place(weight, [patch(values[0], 0.5), patch(values[1], -2.0)])
    torch.testing.assert_close(weight.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("part", "shape"), [((0, 32, 48), (48, COLUMNS)), ((1, 16, 32), (ROWS, 32))])
def test_a_part_of_the_weight_can_have_one_of_its_own(part, shape):
    weight, value = weight_of(torch.float32), lora(*shape)
    right = weight.double()
    right.narrow(*part).copy_(summed(weight.narrow(*part), value, 1.0))
    assert add_in_place(weight, [patch(value, part=part)])
    torch.testing.assert_close(weight.double(), right, rtol=1e-5, atol=1e-5)


def test_kernels_of_convolutions_are_added_to_as_matrices():
    weight = weight_of(torch.float32, ROWS, COLUMNS * 9).view(ROWS, COLUMNS, 3, 3)
    up, down = torch.randn(ROWS, RANK, 1, 1) * 0.1, torch.randn(RANK, COLUMNS, 3, 3) * 0.1
    value = "lora", (up, down, None, None, None)
    right = summed(weight, value, 2.0)
    assert add_in_place(weight, [patch(value, 2.0)])
    torch.testing.assert_close(weight.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        patch(lora(), weight_strength=0.5),
        patch(lora(), function=lambda one: one),
        patch(lora(middle=torch.ones(RANK, RANK, 1, 1))),
        patch(lora(dora_scale=torch.ones(ROWS, 1))),
        patch(lora(columns=COLUMNS // 2)),
        patch(lora(rows=ROWS // 2)),
        patch((torch.ones(ROWS, COLUMNS),)),
        patch(("diff", (torch.ones(ROWS, COLUMNS),))),
        patch(("lokr", (None,) * 9)),
        patch([torch.ones(ROWS, COLUMNS), patch(lora())]),
    ],
    ids=[
        "weakened weight",
        "function",
        "middle",
        "DoRA",
        "fewer columns",
        "fewer rows",
        "difference",
        "named difference",
        "LoKr",
        "nested",
    ],
)
def test_with_another_kind_among_them_nothing_is_changed(other):
    weight = weight_of(torch.float32)
    before = weight.clone()
    assert not add_in_place(weight, [patch(lora()), other])
    assert torch.equal(weight, before)


def test_a_kernel_that_does_not_lie_as_a_matrix_is_left_to_forge():
    weight = torch.ones(ROWS, 3, 3, COLUMNS).permute(0, 3, 1, 2)
    value = "lora", (torch.ones(ROWS, 1, 1, 1), torch.ones(1, COLUMNS, 3, 3), None, None, None)
    assert not add_in_place(weight, [patch(value)])
    assert (weight == 1).all()

"""attach, rebalance, unload, detach: what they do to a module and to the device."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref

import pytest
import swap_models as sm
import torch

import lib_qswap
from lib_qswap.quant.gguf_file import GGUFError
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.swap import inventory, ledger
from lib_qswap.swap.manager import attach, attached

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("engine")]

GPU = "simgpu"
F32 = {"compute_dtype": torch.float32}
OUT_OF_MEMORY = torch.cuda.OutOfMemoryError


def test_detaching_gives_the_module_back_as_it_was(sim, compute_mode, tmp_path):
    model = sm.build(file=tmp_path / "model.gguf")
    before, names = sm.masters(model), list(model.state_dict())
    own = model.blocks[0].up.forward = lambda x: torch.nn.functional.linear(  # some extension's
        x, model.blocks[0].up.weight, model.blocks[0].up.bias
    )
    attachment = lib_qswap.attach(model, device=GPU, budget_bytes=0, **F32)
    sm.run(model, GPU)
    attachment.detach()
    attachment.detach()
    assert model.blocks[0].up.forward is own
    assert [n for n, module in model.named_modules() if "forward" in module.__dict__] == ["blocks.0.up"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert list(model.state_dict()) == names
    assert sm.masters(model) == before
    assert all(isinstance(value, torch.nn.Parameter) for value in model.parameters())
    assert isinstance(model.blocks[0].up.weight, PackedTensor)
    assert {value.device.type for value in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert model.head.weight is model.embed.weight
    assert sim.memory_allocated() == 0
    assert ledger.attachments() == []


def test_a_tied_weight_is_on_the_device_once_and_tied_there(sim):
    model = sm.build()
    tied = model.embed.weight.numel() * 4
    with attached(model, device=GPU, location="shared", budget_bytes=0, **F32) as attachment:
        assert model.head.weight is model.embed.weight
        assert model.head.weight.device.type == GPU
        names = {layer.name for layer in attachment.layers}
        assert "head" not in names
        norms = 3 * 2 * sm.WIDTH * 4
        assert attachment.fixed_bytes == tied + norms + sm.WIDTH * 4


def test_the_model_can_be_attached_again_and_again(sim, compute_mode):
    model = sm.build()
    expected = sm.reference(model)
    for device in (GPU, "cpu", GPU):
        with attached(model, device=device, budget_bytes=0, **F32) as attachment:
            assert torch.equal(sm.run(model, device), expected)
            assert len(attachment.layers) == 7


@pytest.mark.parametrize("location", ["shared", "cpu"])
def test_detaching_gives_back_the_ram_of_weights_that_are_in_a_file(sim, tmp_path, location):
    model = sm.build(file=tmp_path / "model.gguf")
    expected = sm.reference(model)
    attachment = lib_qswap.attach(model, device=GPU, location=location, budget_bytes=0, **F32)
    assert torch.equal(sm.run(model, GPU), expected)
    arenas = {weakref.ref(lay.home.owner) for lay in attachment.layers if lay.home.payload is not None}
    assert arenas
    attachment.detach()
    assert {arena() for arena in arenas} == {None}
    for block in model.blocks:
        packed = block.up.weight.detach()
        assert packed.packed.data_ptr() == packed.source.mapped().data_ptr()
    with attached(model, device=GPU, location=location, budget_bytes=0, **F32):
        assert torch.equal(sm.run(model, GPU), expected)


def test_detaching_gives_page_locks_back_without_copying_what_is_in_no_file(sim):
    model = sm.build()
    expected = sm.reference(model)
    attachment = lib_qswap.attach(model, device=GPU, location="shared", budget_bytes=0, **F32)
    assert torch.equal(sm.run(model, GPU), expected)
    there = model.conv.weight.data_ptr()
    assert model.conv.weight.is_pinned()
    attachment.detach()
    assert not model.conv.weight.is_pinned()
    assert model.conv.weight.data_ptr() == there
    assert attachment.state.pin_budget.used_bytes == 0
    assert torch.equal(sm.reference(model), expected)


def test_what_is_wrong_with_the_arguments_is_said():
    model = sm.build()
    with pytest.raises(ValueError, match="auto, gpu, shared, cpu, disk"):
        attach(model, device=GPU, location="nowhere")
    with pytest.raises((ValueError, RuntimeError), match="nodevice"):
        attach(model, device="nodevice")
    with pytest.raises(ValueError, match="exact, like Forge"):
        attach(model, device=GPU, arithmetic="like forge")
    with pytest.raises(TypeError, match=r"torch\.bfloat16"):
        attach(model, device=GPU, compute_dtype="fp16")
    with pytest.raises(TypeError, match="budget_bytes is '25%'"):
        attach(model, device=GPU, budget_bytes="25%")
    with pytest.raises(ValueError, match="ring_bytes is -1"):
        attach(model, device=GPU, ring_bytes=-1)
    assert ledger.attachments() == []


# --------------------------------------------------------------------------------------------- out of memory
def test_a_device_that_runs_out_of_memory_gets_less_and_the_result_is_right(sim, compute_mode):
    model = sm.build(6)
    expected = sm.reference(model)
    floor, whole, _ = sm.sizes(model, GPU, **F32)
    for total in (whole - 100_000, (floor + whole) // 2):
        sim.empty_cache()
        sim.set_total(total)
        with attached(model, device=GPU, location="shared", budget_bytes=1 << 40, **F32) as attachment:
            assert sim.memory_allocated() <= total
            assert any(layer.resident is None for layer in attachment.layers)
            assert any("no room" in text and "give the weights less" in text for text in sm.messages())
            held = sim.memory_allocated()
            sim.set_total(1 << 30)  # room for activations
            assert held <= total
            assert torch.equal(sm.run(model, GPU), expected)


@pytest.mark.parametrize("failing", [1, 2, 5, 9, 12])
def test_any_allocation_that_fails_while_balancing_is_a_step_down(sim, failing):
    model = sm.build()
    expected = sm.reference(model)
    _, whole, _ = sm.sizes(model, GPU, **F32)
    sim.fail_next_device(failing)
    with attached(model, device=GPU, location="shared", budget_bytes=whole + 1000, **F32) as attachment:
        sim.fail_next_device(0)
        assert attachment.active
        assert attachment.budget_bytes <= whole
        assert torch.equal(sm.run(model, GPU), expected)


def test_a_device_without_room_for_the_floor_is_an_error_and_the_model_is_given_back(sim):
    model = sm.build()
    before = sm.masters(model)
    sim.set_total(500_000)
    with pytest.raises(OUT_OF_MEMORY):
        attach(model, device=GPU, location="shared", budget_bytes=1 << 30, **F32)
    sim.set_total(1 << 30)
    gc.collect()
    assert sim.memory_allocated() == 0
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert sm.masters(model) == before
    assert {value.device.type for value in model.parameters()} == {"cpu"}
    assert ledger.attachments() == []


def test_one_models_trouble_leaves_another_one_running(sim, compute_mode):
    first, second = sm.build(), sm.build(6, seed=1)
    expected = sm.reference(first)
    floor, _, _ = sm.sizes(first, GPU, **F32)
    with attached(first, device=GPU, location="shared", budget_bytes=floor, **F32) as attachment:
        assert torch.equal(sm.run(first, GPU), expected)
        sim.set_total(sim.memory_allocated() + 100_000)
        with pytest.raises(OUT_OF_MEMORY):
            attach(second, device=GPU, location="shared", budget_bytes=0, **F32)
        sim.set_total(1 << 30)
        assert attachment.active
        for _ in range(2):
            assert torch.equal(sm.run(first, GPU), expected)


def test_no_budget_means_what_is_free_less_room_for_activations(sim):
    model = sm.build()
    with attached(model, device=GPU, location="shared", **F32) as attachment:
        assert all(layer.resident is not None for layer in attachment.layers)
        assert attachment.budget_bytes == pytest.approx((2048 << 20) * 7 / 8, rel=0.01)
        assert attachment.state.streamer.ring_bytes == 0


@pytest.mark.parametrize("computed", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["F16", "BF16", "F32"])
def test_plain_weights_are_computed_with_where_they_lie_or_cast_on_the_device(
    sim, compute_mode, name, computed
):
    model = torch.nn.Sequential(*(torch.nn.Linear(sm.WIDTH, sm.WIDTH, device="meta") for _ in range(4)))
    for i, linear in enumerate(model):
        weight = sm.packed_weight(name, (sm.WIDTH, sm.WIDTH), seed=i)
        weight = weight.with_dtype(weight.format.dtype)  # as from a file
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        linear.bias = torch.nn.Parameter(torch.linspace(-1, 1, sm.WIDTH).to(computed), requires_grad=False)
    x = torch.randn((8, sm.WIDTH), generator=torch.Generator().manual_seed(0)).to(computed)
    expected = x
    for linear in model:
        expected = torch.nn.functional.linear(expected, linear.weight.dequantize(computed), linear.bias)
    with attached(model, device=GPU, location="shared", budget_bytes=0, compute_dtype=computed) as attachment:
        assert any(layer.resident is None for layer in attachment.layers)
        assert (attachment.scratch_bytes == 0) == (model[0].weight.format.dtype == computed)
        assert {layer.quant for layer in attachment.layers} == {name}
        for _ in range(3):
            assert torch.equal(model(x.to(GPU)).cpu(), expected)
        assert attachment.state.scratch.nbytes == attachment.scratch_bytes


@pytest.mark.parametrize(("name", "casts"), [("F16", False), ("F32", True), ("Q8_0", True)])
def test_without_a_compute_dtype_16_bits_are_reckoned_with(sim, compute_mode, name, casts):
    linear = torch.nn.Linear(sm.WIDTH, sm.WIDTH, bias=False, device="meta")
    weight = sm.packed_weight(name, (sm.WIDTH, sm.WIDTH))
    if weight.format.dtype is not None:
        weight = weight.with_dtype(weight.format.dtype)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    model = torch.nn.Sequential(linear)
    x = torch.randn((8, sm.WIDTH), generator=torch.Generator().manual_seed(0)).half()
    with attached(model, device=GPU, location="shared", budget_bytes=0) as attachment:
        assert attachment.scratch_bytes == casts * sm.WIDTH * sm.WIDTH * 2
        model(x.to(GPU))
        assert attachment.state.scratch.nbytes == attachment.scratch_bytes


# --------------------------------------------------------------------------------------------- several models
def test_models_share_ring_and_scratch_and_each_keeps_its_budget(sim, compute_mode):
    first, second = sm.build(), sm.build(6, seed=1)
    right = sm.reference(first), sm.reference(second)
    floors = [sm.sizes(model, GPU, **F32)[0] for model in (first, second)]
    with (
        attached(first, device=GPU, location="shared", budget_bytes=floors[0], **F32) as one,
        attached(second, device=GPU, location="cpu", budget_bytes=floors[1], **F32) as two,
    ):
        assert one.state is two.state
        shared = max(one.plan.ring_bytes, two.plan.ring_bytes) + one.state.scratch.nbytes
        assert one.state.shared_bytes == shared
        assert sim.memory_allocated() <= sum(floors)
        for _ in range(3):
            assert torch.equal(sm.run(first, GPU), right[0])
            assert torch.equal(sm.run(second, GPU), right[1])
        one.unload()
        assert torch.equal(sm.run(second, GPU), right[1])
        one.rebalance(floors[0])
        assert torch.equal(sm.run(first, GPU), right[0])


def test_giving_room_to_another_model_drops_residents_and_keeps_the_result(sim, compute_mode):
    model = sm.build(6)
    expected = sm.reference(model)
    with attached(model, device=GPU, location="shared", budget_bytes=1 << 30, **F32) as attachment:
        had = attachment.resident_bytes
        attachment.give_up(had // 3)
        assert had // 3 <= had - attachment.resident_bytes < had
        attachment.rebalance(attachment.resident_bytes + (4 << 20))
        for _ in range(3):
            assert torch.equal(sm.run(model, GPU), expected)
        attachment.give_up(1 << 40)
        assert not attachment.active
        assert sim.memory_allocated() == 0


def test_a_big_embedding_stays_on_the_host_and_only_its_rows_travel(sim, compute_mode, monkeypatch):
    monkeypatch.setattr(inventory, "GATHERED_FROM_BYTES", 100_000)
    for weight in (
        torch.nn.Parameter(torch.randn(1000, 512), requires_grad=False),
        torch.nn.Parameter(sm.packed_weight("Q8_0", (1000, 512)), requires_grad=False),
    ):
        model = torch.nn.Sequential(torch.nn.Embedding(1000, 512, device="meta"), torch.nn.LayerNorm(512))
        model.requires_grad_(False)
        model[0].weight = weight
        plain = weight.detach()
        plain = plain.dequantize(torch.float32) if isinstance(plain, PackedTensor) else plain
        indices = torch.tensor([[3, 999, 0], [3, 7, 500]])
        expected = model[1](plain[indices])
        with (
            attached(model, device=GPU, location="shared", budget_bytes=0, **F32) as attachment,
            torch.inference_mode(),
        ):
            assert attachment.layers == []
            held = sim.memory_allocated()
            assert held < 100_000
            sim.reset_stats()
            assert torch.equal(model(indices.to(GPU)).cpu(), expected)
            assert sim.stats()["h2d_pageable_bytes"] + sim.stats()["h2d_pinned_bytes"] < 20_000


def test_measured_times_lead_to_one_other_plan_at_most(sim, monkeypatch):
    from lib_qswap.swap.manager import Attachment

    balanced = []
    original = Attachment._balance
    monkeypatch.setattr(
        Attachment, "_balance", lambda self, budget: (balanced.append(budget), original(self, budget))
    )
    model = sm.build(6)
    floor, whole, _ = sm.sizes(model, GPU, **F32)
    balanced.clear()
    with attached(
        model, device=GPU, location="shared", budget_bytes=(floor + whole) // 2, **F32
    ) as attached_:
        for _ in range(8):
            sm.run(model, GPU)
        assert len(balanced) in (1, 2)
        names = [layer.name for layer in attached_.layers]
        assert names == [
            *(f"blocks.{i}.{part}" for i in range(6) for part in ("up", "down")),
            "conv",
        ]
        assert all(layer.times.measured is not None for layer in attached_.layers)


def test_a_file_that_changed_is_noticed_only_where_weights_are_read_from_it(sim, tmp_path):
    path = tmp_path / "model.gguf"
    model = sm.build(file=path)
    with attached(model, device=GPU, location="disk", budget_bytes=0, **F32) as attachment:
        attachment.check_files()
        os.utime(path, ns=(1, 1))
        with pytest.raises(GGUFError, match=r"model\.gguf"):
            attachment.check_files()
    model = sm.build(file=path)
    with attached(model, device=GPU, location="shared", budget_bytes=0, **F32) as attachment:
        path.unlink()
        attachment.check_files()


# -- What a user may do wrong, or leave undone ---------------------------------------------------------------


def test_parameters_without_values_are_refused_by_name():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
    state = {"0.weight": torch.ones(256, 256), "0.bias": torch.ones(256)}
    model.load_state_dict(state, strict=False, assign=True)
    with pytest.raises(ValueError, match=r"parameter 1\.weight is on meta: it has no values"):
        attach(model, device=GPU)
    norm = torch.nn.BatchNorm1d(8)
    norm.running_mean = torch.empty(8, device="meta")
    with pytest.raises(ValueError, match="buffer running_mean is on meta"):
        attach(norm, device=GPU)


def test_parameters_on_a_device_are_refused_by_name(sim):
    with pytest.raises(ValueError, match=r"parameter weight is on simgpu.*move the module there first"):
        attach(torch.nn.Linear(8, 8).to(GPU), device=GPU)


def test_a_module_that_is_attached_already_is_refused(sim):
    model = sm.build()
    with attached(model, device=GPU, **F32):
        for again in (model, model.blocks, torch.nn.Sequential(model)):
            with pytest.raises(ValueError, match="is attached already: detach it first"):
                attach(again, device=GPU)
        sm.run(model, GPU)
    with attached(model, device=GPU, **F32):
        sm.run(model, GPU)


def test_arguments_that_cannot_be_are_refused(sim):
    for device in ("meta", "nonsense"):
        with pytest.raises(ValueError, match=f"device is '{device}'"):
            attach(sm.build(), device=device)
    with pytest.raises(TypeError, match="module is NoneType"):
        attach(None, device=GPU)
    with pytest.raises(ValueError, match="floating-point"):
        attach(sm.build(), device=GPU, compute_dtype=torch.int8)
    attachment = attach(sm.build(), device=GPU, **F32)
    with pytest.raises(ValueError, match="budget_bytes is -5"):
        attachment.rebalance(-5)
    with pytest.raises(TypeError, match=r"budget_bytes is 1\.5"):
        attachment.rebalance(1.5)
    attachment.detach()
    with pytest.raises(RuntimeError, match="is detached"):
        attachment.rebalance(0)


def test_buffers_that_forwards_change_outlive_unloading(sim):
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.BatchNorm1d(256))
    with attached(model, device=GPU, location="shared") as attachment:
        for count in range(1, 4):
            model(torch.randn(4, 256).to(GPU))
            assert model[1].num_batches_tracked.item() == count
            mean = model[1].running_mean.cpu()
            attachment.unload()
            assert model[1].num_batches_tracked.item() == count
            attachment.rebalance()
    assert model[1].num_batches_tracked.item() == 3
    assert model[1].num_batches_tracked.device.type == "cpu"
    assert torch.equal(model[1].running_mean, mean)


def test_what_was_trainable_is_so_again(sim):
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
    model[0].weight.requires_grad_(False)
    attach(model, device=GPU).detach()
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True]


@pytest.mark.parametrize("location", ["gpu", "shared", "cpu"])
def test_a_model_that_was_made_in_inference_mode_is_given_back_outside_of_it(location, sim):
    """As Forge makes and runs its models."""
    with torch.inference_mode():
        model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
        x = torch.randn(2, 256)
        expected = model(x)
    attachment = attach(model, device=GPU, location=location, budget_bytes=1 << 30)
    with torch.inference_mode():
        assert torch.equal(model(x.to(GPU)).cpu(), expected)
    attachment.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


SCRIPT = """
import torch
from lib_qswap import attach

model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))
attach(model, device="cpu", location="cpu", budget_bytes=0)
for _ in range(3):
    model(torch.randn(1, 512))
if {raises}:
    raise SystemExit("as it is")
"""


@pytest.mark.parametrize("raises", [False, True])
def test_a_process_ends_well_without_detaching(raises):
    for _ in range(3):
        ended = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(raises=raises)], capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == int(raises), ended.stderr

"""The table of positions of Stable Diffusion 3, in a network of the stand-in."""

from __future__ import annotations

import pytest
import swap_models as sm
import torch

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("engine")]

GPU = "simgpu"
MB = 1 << 20
SIDE = 128


class Transformer(torch.nn.Module):
    """Its table takes 32 MB; positions are taken from its middle, as in Forge's MMDiTX."""

    def __init__(self, operations):
        super().__init__()
        weight = torch.nn.Parameter(sm.packed_weight("Q8_0", (512, 512)), requires_grad=False)
        self.layers = torch.nn.ModuleList([operations.ForgeOperations.Linear(weight)])
        table = torch.arange(SIDE * SIDE * 512, dtype=torch.float32).remainder(977)
        self.register_buffer("pos_embed", table.view(1, SIDE * SIDE, 512))

    def cropped_pos_embed(self, hw):
        top, left = ((SIDE - size) // 2 for size in hw)
        table = self.pos_embed.view(1, SIDE, SIDE, 512)
        return table[:, top : top + hw[0], left : left + hw[1]].reshape(1, -1, 512)

    def forward(self, x, hw):
        return self.layers[0](x + self.cropped_pos_embed(hw).to(x.device, x.dtype))


@pytest.fixture
def loaded(forge):
    """A managed transformer that runs with nothing resident: (the model, which lives as long as somebody has
    it, the module `managed`, its attachment)."""
    patcher = forge.patcher_of(Transformer(forge.operations), torch.float32, torch.device(GPU, 0))
    managed = forge.qswap("managed")
    attachment = managed.attachment_for(patcher)
    managed.set_manual_cast(attachment, managed=True)
    attachment.rebalance(0)
    return patcher.model, managed, attachment


def image(network, hw):
    with torch.inference_mode():
        return network(torch.ones(1, hw[0] * hw[1], 512, device=GPU), hw).cpu()


def expected(network, hw):
    inputs = 1 + Transformer.cropped_pos_embed(network, hw)
    return torch.nn.functional.linear(inputs, sm.packed_weight("Q8_0", (512, 512)).dequantize(torch.float32))


def test_the_table_stays_on_the_host_and_takes_nothing_of_the_budget(sim, loaded):
    model, _, attachment = loaded
    network = model.diffusion_model
    assert attachment.fixed_bytes < MB
    assert network.pos_embed.device.type == "cpu"
    for hw in ((8, 8), (16, 4), (8, 8)):
        assert torch.allclose(image(network, hw), expected(network, hw), rtol=1e-4)
    assert sim.memory_allocated() < 8 * MB


def test_an_images_part_is_copied_in_its_first_step_alone(sim, loaded):
    model, _, attachment = loaded
    network = model.diffusion_model
    image(network, (8, 8))
    step_bytes = []
    for hw in ((8, 8), (8, 8), (64, 64)):
        sim.reset_stats()
        image(network, hw)
        copied = sim.stats()
        step_bytes.append(copied["h2d_pinned_bytes"] + copied["h2d_pageable_bytes"])
    assert step_bytes[0] == step_bytes[1] <= attachment.payload_bytes
    assert step_bytes[2] >= 64 * 64 * 512 * 4


def test_the_part_leaves_the_device_when_the_model_rests_or_is_unloaded(loaded):
    model, _, attachment = loaded
    network = model.diffusion_model
    for leave in (attachment.rest, attachment.unload):
        image(network, (32, 32))
        assert len(attachment.kept) == 1
        leave()
        assert not attachment.kept
        attachment.rebalance(0)


def test_a_network_that_is_given_back_takes_its_own_part_again(loaded):
    model, managed, _ = loaded
    network = model.diffusion_model
    assert "cropped_pos_embed" in vars(network)
    managed.release_all()
    assert "cropped_pos_embed" not in vars(network)
    assert network.cropped_pos_embed((8, 8)).device.type == "cpu"

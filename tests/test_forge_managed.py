"""Models that QSwap serves inside Forge, on the stand-in."""

from __future__ import annotations

from types import SimpleNamespace

import forge_standin
import pytest
import swap_models as sm
import torch

from lib_qswap.swap import inventory

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("engine")]

GPU = "simgpu"


@pytest.fixture
def forge():
    with forge_standin.running() as webui:
        webui.load_scripts()
        webui.script_callbacks.run("ui_settings")
        yield webui


class Wrapper(torch.nn.Module):
    """As Forge's CLIPEmbeddingForTextualInversion."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped
        self.weight = self.wrapped.weight

    def forward(self, indices):
        return self.wrapped(indices) * 2


class Encoder(torch.nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embed = Wrapper(embedding)
        self.up = torch.nn.Linear(512, 512, bias=False, device="meta")
        self.up.weight = torch.nn.Parameter(sm.packed_weight("Q8_0", (512, 512)), requires_grad=False)


def test_clips_embedding_stays_on_the_host_inside_its_wrapper_too(sim, forge, monkeypatch):
    monkeypatch.setattr(inventory, "GATHERED_FROM_BYTES", 100_000)
    managed = forge.qswap("managed")
    embedding = forge.operations.ForgeOperations.Embedding(1000, 512, dtype=torch.float16)
    model = Encoder(embedding.requires_grad_(False))
    weight = embedding.weight
    attachment = managed.attachment_for(SimpleNamespace(model=model, load_device=torch.device(GPU)))
    indices = torch.tensor([[3, 999], [0, 7]])
    expected = weight.float()[indices] * 2
    with torch.inference_mode():
        attachment.rebalance(4 << 20)
        held = sim.memory_allocated()
        for _ in range(2):  # as Forge, for every prompt
            model.embed = model.embed.to(GPU).to(dtype=torch.float32)
        assert model.embed.weight is model.embed.wrapped.weight
        assert model.embed.weight.device.type == "cpu"
        assert model.embed.weight.dtype == torch.float16
        rows = model.embed(indices.to(GPU))
        assert rows.dtype == torch.float32
        assert torch.equal(rows.cpu(), expected)
    assert sim.memory_allocated() - held < 100_000
    managed.release(attachment, model)
    model.embed.to(dtype=torch.float32)
    assert model.embed.weight.dtype == torch.float32
    assert torch.equal(model.embed(indices), expected)

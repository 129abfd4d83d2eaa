"""What a GGUF file holds, in Forge's modules: convolutions, embeddings, norms and the linear layers of text
encoders; on the stand-in."""

from __future__ import annotations

import os
from types import SimpleNamespace

import forge_standin
import gguf
import numpy as np
import pytest
import swap_models
import torch
from gguf_writer import ARRAY, I32, Tensor, Value, gguf_bytes

from lib_qswap.quant.gguf_file import GGUFError, open_gguf
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.swap import ledger

CPU = torch.device("cpu")


@pytest.fixture
def forge():
    """The stand-in with everything of QSwap in place."""
    with forge_standin.running() as webui, swap_models.clean_engine():
        from lib_qswap.forge.patches import PatchTable

        parts = ("loading", "forward", "bnb", "memory", "lora")
        webui.table = PatchTable(patch for part in parts for patch in webui.qswap(part).patches())
        webui.table.apply()
        yield webui
        webui.qswap("managed").release_all()
        webui.table.restore()


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 8


def tensor(name: str, weight: np.ndarray, ggml_type: str, rows: int | None = None) -> Tensor:
    """`weight` in that type, quantized by gguf-py; `rows`: flattened to as many, as some converters do."""
    flat = weight if rows is None else weight.reshape(rows, -1)
    data = gguf.quantize(flat, gguf.GGMLQuantizationType[ggml_type]).tobytes()
    return Tensor(name, flat.shape, ggml_type, data)


@pytest.fixture
def load(forge, tmp_path):
    """Loads tensors, through a file, as Forge does, into a module; returns the file."""

    def into(module: torch.nn.Module, tensors: list[Tensor], metadata=()) -> dict[str, PackedTensor]:
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_bytes(tensors, metadata))
        state_dict = forge.utils.load_torch_file(str(path))
        missing, unexpected = module.load_state_dict(state_dict, strict=False)
        assert not unexpected
        assert all(name.endswith("dummy") for name in missing)
        return open_gguf(path)

    return into


PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class Convolutions(torch.nn.Module):
    def __init__(self, kind: type, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = kind(64, 256, 3, padding=1, dtype=dtype)
        self.second = kind(256, 64, 3, padding=1, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def convolution_tensors(ggml_type: str) -> tuple[list[Tensor], dict[str, Value]]:
    first, second = values(256, 64, 3, 3), values(64, 256, 3, 3, seed=1)
    flattened = None if ggml_type in PLAIN else 576  # 256 * 64 * 3 * 3 / 256
    tensors = [
        tensor("first.weight", first, ggml_type, flattened),
        tensor("first.bias", values(256), "F32"),
        tensor("second.weight", second, ggml_type, flattened),
        tensor("second.bias", values(64), "F32"),
    ]
    shapes = {"first": [256, 64, 3, 3], "second": [64, 256, 3, 3]}
    noted = {
        f"comfy.gguf.orig_shape.{name}.weight": Value(ARRAY, shape, I32) for name, shape in shapes.items()
    }
    return tensors, noted


def expected_of(model: Convolutions, file, x: torch.Tensor) -> torch.Tensor:
    for name in ("first", "second"):
        weight = file[f"{name}.weight"].dequantize(x.dtype)
        x = torch.nn.functional.conv2d(x, weight, getattr(model, name).bias.to(x.dtype), padding=1)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flattened_convolution_stays_packed_and_computes_in_its_own_shape(forge, load, dtype):
    model = Convolutions(forge.operations.ForgeOperations.Conv2d, dtype)
    file = load(model, *convolution_tensors("Q8_0"))
    assert isinstance(model.first.weight, PackedTensor)
    assert model.first.weight.shape == (256, 64, 3, 3)
    assert model.first.bias.dtype == dtype
    x = torch.randn(1, 64, 8, 8).to(dtype)
    expected = expected_of(model, file, x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)  # where Forge computes without swapping
        patcher = patcher_of(forge, model, dtype)
        forge.qswap("managed").load(SimpleNamespace(model=patcher, device=CPU), 1)
        attachment = forge.qswap("managed").attachment_of(patcher.model)
        assert [layer.quant for layer in attachment.layers] == ["Q8_0", "Q8_0"]
        assert attachment.resident_bytes < attachment.payload_bytes
        assert torch.equal(model(x), expected)


def patcher_of(forge, network: torch.nn.Module, dtype: torch.dtype):
    return forge.patcher_of(network, dtype, CPU)


def test_a_packed_convolution_computes_after_qswap_is_switched_off(forge, load):
    model = Convolutions(forge.operations.ForgeOperations.Conv2d)
    file = load(model, *convolution_tensors("Q4_0"))
    forge.table.restore()
    x = torch.randn(1, 64, 8, 8)
    with torch.inference_mode():
        assert torch.equal(model(x), expected_of(model, file, x))


@pytest.mark.parametrize("location", ["Shared", "Disk"])
@pytest.mark.parametrize("ggml_type", PLAIN)
def test_a_convolution_in_the_dtype_that_forge_chose_stays_in_the_file(
    forge, load, location, ggml_type, monkeypatch
):
    dtype = PLAIN[ggml_type]
    monkeypatch.setattr(forge.qswap("loading"), "_is_large", lambda packed: True)
    forge.shared.opts.data["qswap_location"] = location
    model = Convolutions(forge.operations.ForgeOperations.Conv2d, dtype)
    file = load(model, *convolution_tensors(ggml_type))
    x = torch.randn(1, 64, 8, 8).to(dtype)
    expected = expected_of(model, file, x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
        patcher = patcher_of(forge, model, dtype)
        forge.qswap("managed").load(SimpleNamespace(model=patcher, device=CPU), 1)
        attachment = forge.qswap("managed").attachment_of(patcher.model)
        assert [layer.quant for layer in attachment.layers] == [ggml_type] * 2
        if location == "Disk":
            assert [layer.home.kind for layer in attachment.layers] == ["disk", "disk"]
        assert torch.equal(model(x), expected)
        forge.qswap("managed").release_all()
        forge.table.restore()
        assert torch.equal(model(x), expected)


def test_a_convolution_in_another_dtype_is_forges_own(forge, load):
    model = Convolutions(forge.operations.ForgeOperations.Conv2d)
    file = load(model, *convolution_tensors("F16"))
    assert type(model.first.weight) is torch.nn.Parameter
    assert model.first.weight.dtype == torch.float32
    assert torch.equal(model.first.weight, file["first.weight"].dequantize(torch.float32))
    assert not model.first.parameters_manual_cast


@pytest.mark.parametrize("ggml_type", ["Q8_0", "Q4_0", "F16", "BF16", "F32"])
@pytest.mark.parametrize("arithmetic", ["exact", "like Forge"])
def test_a_large_embedding_stays_as_it_is_in_the_file(forge, load, ggml_type, arithmetic, monkeypatch):
    forge.shared.opts.data["qswap_arithmetic"] = arithmetic
    monkeypatch.setattr(forge.qswap("loading"), "GATHERED_FROM_BYTES", 1 << 14)
    module = forge.operations.ForgeOperations.Embedding(2100, 256)
    file = load(module, [tensor("weight", values(2100, 256), ggml_type)])
    assert isinstance(module.weight, PackedTensor)
    indices = torch.tensor([[2099, 0], [7, 7]])
    whole = file["weight"].dequantize(torch.float32, arithmetic=arithmetic, computation_dtype=torch.float16)
    assert torch.equal(module(indices), whole[indices])
    module.to(dtype=torch.float32)  # as Forge, for every prompt
    assert torch.equal(module(indices), whole[indices])


@pytest.mark.parametrize("arithmetic", ["exact", "like Forge"])
def test_a_small_embedding_is_unpacked_at_loading(forge, load, arithmetic):
    forge.shared.opts.data["qswap_arithmetic"] = arithmetic
    module = forge.operations.ForgeOperations.Embedding(32, 64)
    file = load(module, [tensor("weight", values(32, 64), "Q4_0")])
    assert type(module.weight) is torch.nn.Parameter
    how = {"arithmetic": arithmetic, "computation_dtype": torch.float16}
    assert torch.equal(module.weight, file["weight"].dequantize(torch.float32, **how))


def test_a_text_encoders_embedding_needs_no_unpacking_for_forge(forge, tmp_path):
    path = tmp_path / "t5.gguf"
    path.write_bytes(gguf_bytes([tensor("token_embd.weight", values(64, 256), "Q8_0")]))
    embedding = forge.utils.load_torch_file(str(path))["token_embd.weight"]
    assert embedding.dequantize_as_pytorch_parameter() is embedding


@pytest.mark.parametrize("ggml_type", ["Q8_0", "F16", "BF16", "F32"])
def test_norms_in_any_type_are_loaded_with_one_rounding(load, ggml_type):
    model = torch.nn.ModuleDict(
        {"group": torch.nn.GroupNorm(4, 64), "layer": torch.nn.LayerNorm(64, dtype=torch.bfloat16)}
    )
    names = ("group.weight", "group.bias", "layer.weight", "layer.bias")
    tensors = [tensor(name, values(64, seed=i), ggml_type) for i, name in enumerate(names)]
    file = load(model, tensors)
    for name, parameter in model.named_parameters():
        assert type(parameter) is torch.nn.Parameter
        assert torch.equal(parameter, file[name].dequantize(parameter.dtype)), name


@pytest.mark.parametrize(
    ("ggml_type", "packed"), [("Q8_0", True), ("F16", True), ("BF16", False), ("F32", False)]
)
def test_a_plain_linear_layer_keeps_what_is_no_larger_than_its_own_dtype(forge, load, ggml_type, packed):
    module = forge.operations.ForgeOperations.Linear()
    file = load(module, [tensor("weight", values(1200, 512), ggml_type), tensor("bias", values(1200), "F32")])
    assert isinstance(module.weight, PackedTensor) == packed
    assert module.weight.dtype == torch.float16
    x = torch.randn(9, 512)
    weight = file["weight"].dequantize(torch.float32 if packed else torch.float16).float()
    expected = torch.nn.functional.linear(x, weight, file["bias"].dequantize(torch.float16).float())
    with torch.inference_mode():
        assert torch.equal(module(x), expected)


def test_a_unet_with_diffusers_names_is_refused_in_one_sentence(forge, tmp_path):
    path = tmp_path / "unet.gguf"
    path.write_bytes(gguf_bytes([tensor("up_blocks.0.resnets.0.conv1.weight", values(8, 256), "F16")]))
    with pytest.raises(GGUFError, match="tensor names of diffusers"):
        forge.utils.load_torch_file(str(path))
    (message,) = [entry for entry in ledger.snapshot()["messages"] if str(path) in entry["text"]]
    assert message["level"] == "error"


def test_a_file_that_changed_ends_the_generation_and_is_opened_anew_by_the_next(forge, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([tensor("weight", values(256, 256), "Q8_0")]))
    layer = forge.operations.ForgeOperationsGGUF.Linear()
    layer.weight = forge.utils.load_torch_file(str(path))["weight"]
    patcher = patcher_of(forge, layer, torch.float32)
    forge.memory_management.load_models_gpu([patcher])
    forge.sd_models.model_data.forge_hash = "loaded"
    os.utime(path, ns=(1, 1))
    with pytest.raises(GGUFError, match=r"model\.gguf: the model file changed"):
        forge.memory_management.load_models_gpu([patcher])
    assert any("the model file changed" in text for text in swap_models.messages())
    assert forge.sd_models.model_data.forge_hash == ""


def test_files_of_other_programs_are_loaded_under_the_names_that_forge_knows(forge, tmp_path):
    path = tmp_path / "clip.gguf"
    path.write_bytes(gguf_bytes([tensor("t.blk.0.attn_q.weight", values(256, 256), "Q8_0")]))
    (name,) = forge.utils.load_torch_file(str(path))
    assert name == "text_model.encoder.layers.0.self_attn.q_proj.weight"


def test_a_language_model_is_refused_in_one_sentence(forge, tmp_path):
    path = tmp_path / "llama.gguf"
    path.write_bytes(gguf_bytes([tensor("blk.0.attn_q.weight", values(256, 256), "Q8_0")]))
    with pytest.raises(GGUFError, match="a language model"):
        forge.utils.load_torch_file(str(path))
    assert any("a language model" in text for text in swap_models.messages())


def test_a_file_that_cannot_be_read_is_what_forge_says_and_is_opened_again(forge, tmp_path, monkeypatch):
    """A network drive, say: Forge has dropped the model before, and takes it for loaded."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([tensor("weight", values(256, 256), "Q8_0")]))
    monkeypatch.setattr(forge.qswap("names"), "known_to_forge", lambda file: os.stat(tmp_path / "gone"))
    forge.sd_models.model_data.forge_hash = "loaded"
    with pytest.raises(FileNotFoundError):
        forge.sd_models.forge_loader(str(path))
    assert forge.sd_models.model_data.forge_hash == ""
    assert any("gone" in text for text in swap_models.messages())


def test_what_is_wrong_with_a_file_is_what_forge_says_too(forge, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(GGUFError, match=r"model\.gguf: version: needs 4 bytes"):
        forge.sd_models.forge_loader(str(path))
    with pytest.raises(ValueError, match="Failed to recognize model type!"):
        forge.sd_models.forge_loader(None)
    forge.table.restore()
    with pytest.raises(ValueError, match="Failed to recognize model type!"):
        forge.sd_models.forge_loader(str(path))

"""bitsandbytes and FP8 weights in Forge: left to it where they fit, else swapped, with the same result."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import forge_standin
import pytest
import swap_models
import torch
from bnb_checkpoint import quantized

from lib_qswap.quant.packed import PackedTensor

SIZE = 512
LAYERS = 6
CPU = torch.device("cpu")


@pytest.fixture
def forge():
    """The stand-in with everything of QSwap in place; the device is the CPU, with as much free memory as a
    test says."""
    with forge_standin.running() as webui, swap_models.clean_engine():
        from lib_qswap.forge.patches import PatchTable

        parts = ("loading", "forward", "bnb", "memory", "lora")
        table = PatchTable(patch for part in parts for patch in webui.qswap(part).patches())
        table.apply()
        webui.memory_management.get_free_memory = lambda dev=None, torch_free_too=False: webui.free_bytes
        webui.free_bytes = 1 << 40
        yield webui
        webui.qswap("managed").release_all()
        table.restore()


class Network(torch.nn.Module):
    def __init__(self, layers) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def patcher_of(forge, layers, dtype: torch.dtype):
    return forge.patcher_of(Network(layers), dtype, CPU)


def bnb_parameter(forge, weight, *, bnb_quantized=True):
    """As `Params4bit.from_prequantized` makes it of a checkpoint's tensors."""
    own, tensors = forge.operations_bnb, weight.tensors
    inner = offset = None
    if "nested_absmax" in tensors:
        inner = own.QuantState(tensors["nested_absmax"], code=tensors["nested_quant_map"], blocksize=256)
        offset = torch.tensor(0.03)
    quant_type = "nf4" if "quant_state.bitsandbytes__nf4" in tensors else "fp4"
    state = own.QuantState(
        tensors["absmax"],
        weight.values.shape,
        tensors["quant_map"],
        64,
        quant_type,
        torch.bfloat16,
        offset,
        inner,
    )
    return own.ForgeParams4bit(tensors[""], state, bnb_quantized)


@pytest.fixture
def bnb_model(forge):
    def build(dtype: torch.dtype, columns: int = SIZE):
        layers = []
        for seed in range(LAYERS):
            weight = quantized(("nf4", "fp4")[seed % 2], (columns, SIZE), nested=seed > 2, seed=seed)
            bias = torch.nn.Parameter(torch.randn(columns) * 0.01, requires_grad=False)
            layers.append(forge.operations.ForgeOperationsBNB4bits.Linear(bnb_parameter(forge, weight), bias))
        return patcher_of(forge, layers, dtype)

    return build


def inputs(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(patcher, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return patcher.model.diffusion_model(x).clone()


def managed_load(forge, patcher, budget_bytes: int) -> None:
    """As `load_models_gpu` does it on a GPU with so little free memory; the CPU itself is never short."""
    available = forge.qswap("managed")
    available.load(SimpleNamespace(model=patcher, device=CPU), budget_bytes)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("arithmetic", ["exact", "like Forge"])
def test_a_bnb_model_that_is_taken_over_computes_what_it_did(forge, bnb_model, arithmetic, dtype, tokens):
    forge.shared.opts.data["qswap_arithmetic"] = arithmetic
    patcher, x = bnb_model(dtype), inputs(tokens, dtype)
    expected = run(patcher, x)
    calls = forge.operations_bnb.matmuls
    forge.qswap("bnb").take_over(patcher)
    assert all(isinstance(layer.weight, PackedTensor) for layer in patcher.model.diffusion_model.layers)
    alone = run(patcher, x)  # packed, where Forge has put it
    managed_load(forge, patcher, 1 << 20)
    first, again = run(patcher, x), run(patcher, x)
    assert torch.equal(first, again)
    assert torch.equal(first, alone)
    if arithmetic == "like Forge":
        assert torch.equal(first, expected)
        assert forge.operations_bnb.matmuls == calls + 3 * LAYERS
    else:
        # Forge rounds to the bf16 that the files name first.
        assert torch.equal(first, expected) == (dtype == torch.bfloat16)
        torch.testing.assert_close(first.float(), expected.float(), rtol=0.1, atol=0.01)
        assert forge.operations_bnb.matmuls == calls
    attachment = forge.qswap("managed").attachment_of(patcher.model)
    assert attachment.resident_bytes < attachment.payload_bytes


def balance(forge, patcher) -> None:
    forge.qswap("memory")._balance(patcher, None, 0, [])


@pytest.fixture
def device_that_is_no_cpu(forge, monkeypatch):
    """QSwap serves nothing that Forge computes on the CPU."""
    monkeypatch.setattr(forge.qswap("managed"), "wants_care", lambda patcher: False)


def test_a_bnb_model_that_fits_is_left_to_forge_and_one_that_does_not_is_taken_over(
    forge, bnb_model, device_that_is_no_cpu
):
    patcher = bnb_model(torch.bfloat16)
    loaded = []
    forge.memory_management.LoadedModel.model_load = lambda self, budget=-1: loaded.append(budget)
    nbytes = LAYERS * SIZE * SIZE * 1.1 // 2
    # Of parameters that are on the device already, as all are here, nothing is left to load.
    module_size = forge.memory_management.module_size
    forge.memory_management.module_size = lambda module, exclude_device=None: module_size(module)
    forge.free_bytes = 2 * nbytes
    balance(forge, patcher)
    assert loaded == [-1]
    assert not forge.qswap("managed").has_packed_weights(patcher.model)
    forge.memory_management.current_loaded_models.clear()
    forge.free_bytes = nbytes // 2
    x = inputs(5, torch.bfloat16)
    expected = run(patcher, x)
    balance(forge, patcher)
    assert loaded == [-1]
    assert forge.qswap("managed").attachment_of(patcher.model).active
    assert torch.equal(run(patcher, x), expected)


def test_a_bnb_model_that_cannot_be_packed_stays_with_forge_and_its_own_swapping(
    forge, bnb_model, device_that_is_no_cpu
):
    from lib_qswap.swap import ledger

    patcher = bnb_model(torch.bfloat16)
    weight = patcher.model.diffusion_model.layers[2].weight
    weight.quant_state.blocksize = 32
    loaded = []
    forge.memory_management.LoadedModel.model_load = lambda self, budget=-1: loaded.append(budget)
    forge.memory_management.module_size = lambda *args, **kwargs: 1 << 30
    forge.free_bytes = 1 << 29
    balance(forge, patcher)
    assert loaded == [1 << 29]
    assert not forge.qswap("managed").has_packed_weights(patcher.model)
    (reason,) = [entry["reason"] for entry in ledger.snapshot()["models"] if "reason" in entry]
    assert reason == "left to Forge: diffusion_model.layers.2.weight is no whole number of blocks of 64"


def test_a_model_that_is_still_to_be_quantized_needs_the_gpu_for_it(forge):
    weight = forge.operations_bnb.ForgeParams4bit(torch.randn(64, 64), bnb_quantized=False)
    layer = forge.operations.ForgeOperationsBNB4bits.Linear(weight)
    patcher = patcher_of(forge, [layer], torch.float16)
    assert "is not quantized yet" in forge.qswap("bnb").refusal(patcher)
    patcher.load_device = torch.device("cuda")
    assert forge.qswap("bnb").refusal(patcher) is None


def test_a_model_that_is_still_to_be_quantized_is_quantized_by_bitsandbytes(forge, bnb_model):
    patcher = bnb_model(torch.bfloat16)
    x = inputs(3, torch.bfloat16)
    expected = run(patcher, x)
    moved = []
    for layer in patcher.model.diffusion_model.layers:
        plain = forge.operations_bnb.ForgeParams4bit(torch.empty(SIZE, SIZE), bnb_quantized=False)
        plain.to = lambda device, done=layer.weight: moved.append(device) or done
        layer.weight = plain
    forge.qswap("bnb").take_over(patcher)
    assert moved == [CPU] * LAYERS
    assert torch.equal(run(patcher, x), expected)


def test_loras_of_a_bnb_model_are_taken_out_and_added_on_the_fly_from_then_on(forge, bnb_model):
    patcher = bnb_model(torch.bfloat16)
    refreshed = []
    patcher.lora_loader.refresh = lambda patches=None, **kwargs: refreshed.append(
        list(kwargs.get("lora_patches", patches))
    )
    patcher.add_patches(filename="style", patches={"diffusion_model.layers.0.weight": 1})
    patcher.refresh_loras()
    forge.qswap("bnb").take_over(patcher)
    patcher.refresh_loras()
    assert refreshed == [[("style", 1.0, 1.0, False)], [], [("style", 1.0, 1.0, True)]]


class Normed(Network):
    """With a norm whose forward adds nothing on the fly, as most of Forge's."""

    def __init__(self, layers) -> None:
        super().__init__(layers)
        self.norm = torch.nn.LayerNorm(SIZE).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x).float())


STYLE = {"diffusion_model.layers.0.weight": 0.01, "diffusion_model.norm.weight": 2.0}


@pytest.fixture
def normed(forge):
    layers = [
        forge.operations.ForgeOperations.Linear(
            torch.nn.Parameter(swap_models.packed_weight("Q8_0", (SIZE, SIZE), seed), requires_grad=False)
        )
        for seed in range(LAYERS)
    ]
    return forge.patcher_of(Normed(layers), torch.float32, CPU)


def test_a_lora_reaches_the_norms_of_a_packed_model_too(forge, normed):
    x = inputs(3, torch.float32)
    plain = run(normed, x)
    with torch.inference_mode():
        weight = normed.model.diffusion_model.layers[0].weight.dequantize(torch.float32) + 0.01
        expected = torch.nn.functional.linear(x, weight)
        for layer in normed.model.diffusion_model.layers[1:]:
            expected = torch.nn.functional.linear(expected, layer.weight.dequantize(torch.float32))
        expected = torch.nn.functional.layer_norm(expected, (SIZE,), torch.full((SIZE,), 3.0))
    assert normed.add_patches(filename="style", patches={**STYLE, "elsewhere.weight": 1.0}) == set(STYLE)
    managed_load(forge, normed, 1 << 20)
    for _ in range(2):
        normed.refresh_loras()
        assert torch.allclose(run(normed, x), expected, atol=1e-4)
    normed.lora_patches = {}
    normed.refresh_loras()
    assert torch.equal(run(normed, x), plain)


def test_a_norm_that_was_to_be_merged_is_merged_when_the_weights_come_to_be_packed(forge, bnb_model):
    patcher = bnb_model(torch.bfloat16)
    patcher.model.norm = torch.nn.LayerNorm(SIZE)
    patches = {"diffusion_model.layers.0.weight": 1.0, "norm.weight": 2.0}
    patcher.add_patches(filename="style", patches=patches)
    forge.qswap("bnb").take_over(patcher)
    patcher.refresh_loras()
    assert [key[3] for key in patcher.lora_patches] == [True, False]
    assert patcher.model.diffusion_model.layers[0].forge_online_loras.keys() == {"weight"}
    assert torch.equal(patcher.model.norm.weight, torch.full((SIZE,), 3.0))


def test_a_lora_that_was_loaded_again_takes_the_place_of_the_first(forge, normed):
    """For another strength of the text encoder's part: under the same name and strength here."""
    layer = normed.model.diffusion_model.layers[0]
    for _ in range(2):
        normed.lora_patches = {}
        normed.add_patches(filename="style", patches=STYLE)
        for _ in range(2):
            normed.refresh_loras()
            (own,) = normed.lora_patches["style", 1.0, 1.0, True]["diffusion_model.layers.0.weight"]
            (added,) = layer.forge_online_loras["weight"]
            assert added is own


def test_a_bnb_model_that_was_taken_over_is_saved_as_bitsandbytes_had_it(forge, bnb_model):
    patcher, x = bnb_model(torch.bfloat16), inputs(3, torch.bfloat16)
    expected = run(patcher, x)
    plain = {name: tensor.clone() for name, tensor in patcher.model.state_dict().items()}
    forge.qswap("bnb").take_over(patcher)
    managed_load(forge, patcher, 1 << 20)
    saved = forge.utils.get_state_dict_after_quant(patcher.model.diffusion_model, prefix="model.")
    assert not any(isinstance(tensor, PackedTensor) for tensor in saved.values())
    for index, layer in enumerate(patcher.model.diffusion_model.layers):
        key = f"model.layers.{index}.weight"
        assert torch.equal(saved[key], plain[f"diffusion_model.layers.{index}.weight"])
        state = forge.operations_bnb.QuantState(
            saved[f"{key}.absmax"],
            shape=layer.weight.shape,
            code=saved[f"{key}.quant_map"],
            blocksize=64,
            dtype=torch.bfloat16,
        )
        own = forge.operations_bnb.ForgeParams4bit(saved[key], state)
        x = forge.operations_bnb.functional_linear_4bits(x, own, layer.bias.to(x.dtype))
    assert torch.equal(x, expected)


def test_weights_of_a_gguf_file_are_not_saved_as_bytes_that_nobody_can_read(forge, normed):
    with pytest.raises(NotImplementedError, match="the file itself has them all"):
        forge.utils.get_state_dict_after_quant(normed.model)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arithmetic", ["exact", "like Forge"])
def test_fp8_that_does_not_fit_is_swapped_and_scaled_as_forge_does_it(forge, arithmetic, dtype, kind):
    """The scale in the computation dtype, times the weight in it."""
    forge.shared.opts.data["qswap_arithmetic"] = arithmetic
    torch.manual_seed(0)
    layers = []
    for index in range(LAYERS):
        scale = torch.nn.Parameter(torch.tensor(0.0123 * (index + 1)), requires_grad=False) if index else None
        weight = torch.nn.Parameter(torch.randn(SIZE, SIZE).to(kind), requires_grad=False)
        layers.append(forge.operations.ForgeOperations.Linear(weight, scale_weight=scale))
    patcher, x = patcher_of(forge, layers, dtype), inputs(5, dtype) * 0.01
    expected = x
    for layer in layers:
        weight = layer.weight.to(dtype)
        if layer.scale_weight is not None:
            weight = weight * layer.scale_weight.to(dtype)
        expected = torch.nn.functional.linear(expected, weight)
    assert expected.isfinite().all()
    assert torch.equal(run(patcher, x), expected)
    before = swap_models.masters(patcher.model)
    managed_load(forge, patcher, 2 << 20)
    for _ in range(2):
        assert torch.equal(run(patcher, x), expected)
    attachment = forge.qswap("managed").attachment_of(patcher.model)
    assert 0 < attachment.resident_bytes < attachment.payload_bytes
    assert swap_models.masters(patcher.model) == before


def test_a_bnb_model_that_fails_while_it_is_packed_still_computes_in_forge(
    forge, bnb_model, device_that_is_no_cpu
):
    from lib_qswap.swap import ledger

    patcher, x = bnb_model(torch.bfloat16), inputs(3, torch.bfloat16)
    expected = run(patcher, x)
    weight = patcher.model.diffusion_model.layers[3].weight
    weight.quant_state.absmax, absmax = weight.quant_state.absmax[1:], weight.quant_state.absmax
    loaded = []
    forge.memory_management.LoadedModel.model_load = lambda self, budget=-1: loaded.append(budget)
    forge.memory_management.module_size = lambda *args, **kwargs: 1 << 30
    forge.free_bytes = 1 << 29
    balance(forge, patcher)
    assert loaded == [1 << 29]
    (reason,) = [entry["reason"] for entry in ledger.snapshot()["models"] if "reason" in entry]
    assert "nested statistics" in reason or "scales, not" in reason
    weight.quant_state.absmax = absmax
    assert forge.qswap("managed").has_packed_weights(patcher.model)  # some of its weights
    assert torch.equal(run(patcher, x), expected)


@pytest.fixture
def merged(forge, monkeypatch):
    """The weights that Forge's own function adds LoRAs to; it adds a half, whatever they are."""
    lora, weights = importlib.import_module("backend.patcher.lora"), []
    merge = lora.merge_lora_to_weight
    monkeypatch.setattr(
        lora,
        "merge_lora_to_weight",
        lambda patches, weight, **kwargs: weights.append(weight) or merge([(1.0, 0.5)], weight),
    )
    return weights


@pytest.mark.parametrize("budget_bytes", [0, 1 << 30])
@pytest.mark.parametrize("arithmetic", ["exact", "like Forge"])
def test_a_plain_lora_on_packed_weights_is_rounded_once_or_added_as_forge_does(
    forge, normed, merged, arithmetic, budget_bytes
):
    forge.shared.opts.data["qswap_arithmetic"] = arithmetic
    up, down = torch.randn(SIZE, 4) * 0.1, torch.randn(4, SIZE) * 0.1
    patches = {"diffusion_model.layers.0.weight": ("lora", (up, down, 2.0, None, None))}
    layers = normed.model.diffusion_model.layers
    masters = [layer.weight.packed.clone() for layer in layers]
    first = layers[0].weight.dequantize(
        torch.float32, arithmetic=arithmetic, computation_dtype=layers[0].weight.dtype
    )
    added = 0.5 if arithmetic == "like Forge" else 0.5 * (up @ down)
    x = inputs(3, torch.float32)
    with torch.inference_mode():
        expected = torch.nn.functional.linear(x, first + added)
    normed.add_patches(filename="style", patches=patches)
    managed_load(forge, normed, budget_bytes)
    normed.refresh_loras()
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(layers[0](x), expected, rtol=1e-4, atol=1e-4)
    assert bool(merged) == (arithmetic == "like Forge")
    assert all(torch.equal(layer.weight.packed, m) for layer, m in zip(layers, masters, strict=True))


def test_a_lora_on_the_fly_on_a_plain_weight_is_added_as_forge_does_in_exact_arithmetic_too(forge, merged):
    """As it is where the model fits, and is left to Forge."""
    forge.shared.opts.data["qswap_arithmetic"] = "exact"
    layers = [forge.operations.ForgeOperations.Linear(torch.nn.Parameter(torch.randn(SIZE, SIZE)))]
    patcher, x = patcher_of(forge, layers, torch.float32), inputs(3, torch.float32)
    value = "lora", (torch.ones(SIZE, 4), torch.ones(4, SIZE), None, None, None)
    patcher.add_patches(
        filename="style", patches={"diffusion_model.layers.0.weight": value}, online_mode=True
    )
    managed_load(forge, patcher, 1 << 20)
    patcher.refresh_loras()
    expected = torch.nn.functional.linear(x, layers[0].weight.detach() + 0.5)
    torch.testing.assert_close(run(patcher, x), expected)
    assert len(merged) == 1

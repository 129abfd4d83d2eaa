"""The stand-alone host's transformer and its denoising loop, with plain weights: no swapping here."""

from __future__ import annotations

import math

import pytest
import torch

from lib_qswap.quant.formats import FORMATS
from lib_qswap.quant.gguf_file import GGUFError
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.standalone import flux
from lib_qswap.standalone.denoise import denoise, preview, schedule
from lib_qswap.standalone.flux import FluxShape, FluxTransformer

SHAPE = FluxShape(hidden=256, mlp=1024, double_blocks=2, single_blocks=2, context=32, vector=16)


def wave(*shape: int, rate: float) -> torch.Tensor:
    """Numbers that anybody can make again."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * rate).view(shape).float()


def weights(shape: FluxShape = SHAPE) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        parameters = FluxTransformer(shape).state_dict()
    made = {}
    for index, (name, parameter) in enumerate(parameters.items()):
        value = wave(*parameter.shape, rate=0.37 + 0.01 * index)
        if name.endswith("scale"):
            made[name] = 1 + 0.1 * value
        else:
            made[name] = value * (0.1 if value.ndim == 1 else math.sqrt(2 / value.shape[-1]))
    return made


def as_file(tensors: dict[str, torch.Tensor]) -> dict[str, PackedTensor]:
    """What `open_gguf` would give for a file of F32 tensors."""
    return {
        name: PackedTensor(tensor.contiguous().view(-1).view(torch.uint8), FORMATS["F32"], tensor.shape)
        for name, tensor in tensors.items()
    }


def build(tensors: dict[str, torch.Tensor]) -> FluxTransformer:
    return flux.build(as_file(tensors), "model.gguf", dtype=torch.float32)


def run(model: FluxTransformer, *, steps: int = 2, seed: int = 0, on_step=lambda done: None):
    cpu = torch.device("cpu")
    return denoise(
        model,
        device=cpu,
        dtype=torch.float32,
        steps=steps,
        pixels=64,
        seed=seed,
        synchronize=lambda: None,
        on_step=on_step,
    )


@pytest.fixture(scope="module")
def model() -> FluxTransformer:
    return build(weights())


@torch.inference_mode()
def test_the_flow_is_what_the_published_architecture_computes(model):
    tokens, text, pooled = wave(1, 6, 64, rate=0.71), wave(1, 5, 32, rate=0.53), wave(1, 16, rate=0.9)
    rotation = flux.rotary_rotation(128, 5, 3, 2)
    flow = model(tokens, text, pooled, torch.tensor([0.37]), rotation, torch.tensor([3.5]))
    # Every 16th channel of each token, by Forge's implementation (dfdcbab6) with the same weights, in fp32.
    expected = torch.tensor(
        [
            [0.09423, 0.33093, -0.20528, -0.24325],
            [0.6062, 0.02984, -0.60968, 0.20232],
            [0.46737, -0.52829, -0.27146, 0.63961],
            [-0.07954, -0.35099, 0.2121, 0.28955],
            [-0.06025, 0.24454, -0.01994, -0.22307],
            [0.48726, 0.20313, -0.55266, 0.00865],
        ]
    )
    torch.testing.assert_close(flow[0, :, ::16], expected, rtol=0, atol=5e-5)


def test_every_dimension_is_read_off_the_tensors():
    shape = FluxShape(
        hidden=192,
        head_dim=64,
        mlp=320,
        double_blocks=1,
        single_blocks=3,
        in_channels=96,
        out_channels=32,
        context=40,
        vector=24,
        guidance=False,
    )
    assert build(weights(shape)).shape == shape


def test_a_model_without_guidance_embedding_takes_even_steps_and_runs():
    schnell = SHAPE._replace(guidance=False)
    latent = run(build(weights(schnell))).latent
    assert latent.isfinite().all()
    assert latent.std() > 0.1
    assert schedule(4, 1024, shifted=False) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_model_with_image_conditioning_runs():
    latent = run(build(weights(SHAPE._replace(in_channels=384)))).latent
    assert latent.shape == (16, 8, 8)
    assert latent.isfinite().all()
    assert latent.std() > 0.1


def test_tensors_of_a_whole_checkpoint_are_found_under_its_prefix(model):
    prefixed = {"model.diffusion_model." + name: tensor for name, tensor in weights().items()}
    prefixed["vae.decoder.conv_in.weight"] = torch.ones(4, 4)
    assert run(build(prefixed)).sha256 == run(model).sha256


def test_a_file_of_another_architecture_is_refused_with_what_it_lacks():
    with pytest.raises(GGUFError, match=r"model\.gguf: not a Flux-family transformer.*img_in\.weight.* more"):
        build({"blk.0.attn_q.weight": torch.ones(4, 4)})


def test_a_missing_tensor_is_named():
    tensors = weights()
    del tensors["double_blocks.1.txt_mlp.2.bias"]
    with pytest.raises(GGUFError, match=r"it has no tensor double_blocks\.1\.txt_mlp\.2\.bias$"):
        build(tensors)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes():
    tensors = weights()
    tensors["single_blocks.1.linear2.weight"] = torch.ones(256, 1024)
    with pytest.raises(
        GGUFError, match=r"single_blocks\.1\.linear2\.weight has shape \(256, 1024\).*\(256, 1280\)"
    ):
        build(tensors)


def test_a_block_number_of_a_billion_is_a_missing_block_and_not_a_billion_blocks():
    tensors = weights()
    tensors["single_blocks.999999999.linear1.weight"] = torch.ones(4, 4)
    with pytest.raises(GGUFError, match=r"has no tensor single_blocks\.2\."):
        build(tensors)


@pytest.mark.parametrize("channels", [0, 5, 48, 1024])
def test_a_head_size_that_does_not_fit_is_refused(channels):
    tensors = weights()
    tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.ones(channels)
    with pytest.raises(GGUFError, match=f"query_norm.scale has {channels} channels"):
        build(tensors)


def test_text_tokens_are_not_rotated_and_image_tokens_by_their_place_only():
    cos, sin = flux.rotary_rotation(128, 3, 4, 4)
    assert torch.equal(cos[:3], torch.ones(3, 64))
    assert torch.equal(sin[:3], torch.zeros(3, 64))
    query, key = torch.randn(2, 64, 2, generator=torch.Generator().manual_seed(1)).flatten(1).unbind()

    def product(first: tuple[int, int], second: tuple[int, int]) -> float:
        """Of the query at one place (row, column) and the key at another."""
        rotation = torch.stack((cos, sin))
        at = [3 + row * 4 + column for row, column in (first, second)]
        turned = [
            flux.rotate(x.view(1, 1, 1, 128), rotation[:, i : i + 1])
            for x, i in zip((query, key), at, strict=True)
        ]
        return float((turned[0] * turned[1]).sum())

    assert product((0, 1), (2, 2)) == pytest.approx(product((1, 2), (3, 3)), abs=1e-4)
    assert abs(product((0, 1), (2, 2)) - product((0, 1), (2, 1))) > 0.01


def test_the_same_seed_gives_the_same_bits_and_another_seed_gives_others(model):
    first, again, other = run(model), run(model), run(model, seed=1)
    assert first.latent.isfinite().all()
    assert first.latent.std() > 0.1
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256
    assert (first.latent - other.latent).abs().max() > 0.1


def test_each_step_is_reported_and_timed(model):
    done: list[int] = []
    assert len(run(model, steps=3, on_step=done.append).step_seconds) == 3
    assert done == [1, 2, 3]


def test_the_schedule_falls_from_noise_to_image_and_is_shifted_towards_noise_for_larger_images():
    small, large = schedule(8, 256, shifted=True), schedule(8, 4096, shifted=True)
    assert small[0] == large[0] == 1
    assert small[-1] == large[-1] == 0
    assert small == sorted(small, reverse=True)
    # Half way, with a shift of s, is s / (s + 1); its logarithm is 0.5 at 256 tokens and 1.15 at 4096.
    assert small[4] == pytest.approx(math.exp(0.5) / (math.exp(0.5) + 1))
    assert large[4] == pytest.approx(math.exp(1.15) / (math.exp(1.15) + 1))


def test_weights_that_give_no_finite_latent_are_reported():
    tensors = weights()
    tensors["final_layer.linear.bias"] = torch.full((64,), float("inf"))
    with pytest.raises(FloatingPointError, match="not finite"):
        run(build(tensors))


@pytest.mark.parametrize(("steps", "pixels"), [(0, 64), (1, 0), (1, 100)])
def test_a_run_that_cannot_be_is_refused(model, steps, pixels):
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="must be"):
        denoise(
            model,
            device=cpu,
            dtype=torch.float32,
            steps=steps,
            pixels=pixels,
            seed=0,
            synchronize=lambda: None,
        )


def test_the_preview_shows_where_the_latent_differs():
    latent = torch.zeros(16, 8, 8)
    latent[3, :, 4:] = 1
    picture = preview(latent, scale=4)
    assert picture.shape == (32, 32, 3)
    assert picture.dtype == torch.uint8
    left, right = picture[:, :16].float(), picture[:, 16:].float()
    assert left.std(dim=(0, 1)).max() == right.std(dim=(0, 1)).max() == 0
    assert (left[0, 0] - right[0, 0]).abs().max() > 50

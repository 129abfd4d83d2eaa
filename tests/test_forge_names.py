"""Files of stable-diffusion.cpp, clip.cpp and llama.cpp: their tensors as Forge looks for them, or a sentence
that says what the file is."""

import pytest
import torch
from gguf_writer import Tensor, gguf_bytes

from lib_qswap.forge.names import known_to_forge, refusal
from lib_qswap.quant.gguf_file import open_gguf

UNET = "model.diffusion_model."
BLOCK = f"{UNET}input_blocks.4.1."
CLIP = "cond_stage_model.transformer.text_model."
SECOND_CLIP = "cond_stage_model.1.transformer.text_model."


@pytest.fixture
def known(tmp_path):
    """The tensors of a file as Forge gets them, by name."""

    def of(*tensors: Tensor):
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_bytes(tensors))
        return known_to_forge(open_gguf(path))

    return of


def f16(name: str, *shape: int) -> Tensor:
    data = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).remainder(99).half()
    return Tensor(name, shape, "F16", data.numpy().tobytes())


def unet(context_width: int, channels: int = 32) -> list[Tensor]:
    return [
        f16(f"{BLOCK}proj_in.weight", channels, channels, 1, 1),
        f16(f"{BLOCK}proj_out.weight", channels, channels, 1, 1),
        f16(f"{BLOCK}transformer_blocks.0.attn2.to_k.weight", channels, context_width),
        f16(f"{UNET}input_blocks.0.0.weight", channels, 4, 3, 3),
    ]


def tokens(prefix: str, width: int) -> Tensor:
    return f16(f"{prefix}embeddings.token_embedding.weight", 8, width)


def test_a_checkpoint_of_stable_diffusion_1_has_its_names_and_shapes_already(known):
    file = [*unet(768), tokens(CLIP, 768), f16("first_stage_model.decoder.conv_in.weight", 8, 4, 3, 3)]
    found = known(*file)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        tensor.name: tensor.shape for tensor in file
    }


def test_both_text_encoders_of_an_sdxl_checkpoint_get_the_names_of_the_original(known):
    found = known(
        *unet(2048),
        tokens(CLIP, 768),
        tokens(SECOND_CLIP, 1280),
        f16(f"{SECOND_CLIP}encoder.layers.0.self_attn.q_proj.weight", 64, 64),
        f16(f"{SECOND_CLIP}text_projection", 64, 32),
        f16("first_stage_model.decoder.conv_in.weight", 8, 4, 3, 3),
    )
    assert {name for name in found if not name.startswith(UNET)} == {
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
        "conditioner.embedders.1.model.transformer.text_model.embeddings.token_embedding.weight",
        "conditioner.embedders.1.model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "conditioner.embedders.1.model.text_projection",
        "first_stage_model.decoder.conv_in.weight",
    }


@pytest.mark.parametrize(
    ("width", "prefix"),
    [(1024, "cond_stage_model.model."), (1280, "conditioner.embedders.0.model.")],
    ids=["stable diffusion 2", "refiner"],
)
def test_a_single_wide_text_encoder_gets_the_prefix_of_its_model(known, width, prefix):
    found = known(*unet(width), tokens(CLIP, width), f16(f"{CLIP}text_projection", 64, 32))
    assert f"{prefix}transformer.text_model.embeddings.token_embedding.weight" in found
    assert f"{prefix}text_projection" in found


@pytest.mark.parametrize("channels", [32, 800], ids=["copied", "mapped"])
@pytest.mark.parametrize("width", [1024, 1280, 2048])
def test_linear_layers_that_were_made_convolutions_are_linear_again(known, width, channels):
    found = known(*unet(width, channels))
    for name in ("proj_in", "proj_out"):
        weight = found[f"{BLOCK}{name}.weight"]
        assert weight.shape == (channels, channels)
        expected = torch.arange(channels * channels).remainder(99).view(channels, channels)
        assert torch.equal(weight.dequantize(torch.float32), expected.float())
    assert found[f"{UNET}input_blocks.0.0.weight"].dim() == 4


def test_a_joined_projection_is_taken_apart_and_stays_packed(known):
    rows = Tensor(f"{SECOND_CLIP}encoder.layers.0.self_attn.in_proj.weight", (96, 256), "Q4_K")
    found = known(tokens(SECOND_CLIP, 1280), rows)
    layer = "conditioner.embedders.1.model.transformer.text_model.encoder.layers.0.self_attn."
    for name in ("q_proj", "k_proj", "v_proj"):
        part = found[f"{layer}{name}.weight"]
        assert (part.ggml_type, tuple(part.shape)) == ("Q4_K", (32, 256))
        assert part.source is not None


def test_the_vae_of_a_flux_checkpoint_gets_the_prefix_of_flux(known):
    found = known(
        f16(f"{UNET}double_blocks.0.img_attn.qkv.weight", 96, 32),
        f16("first_stage_model.decoder.conv_in.weight", 8, 16, 3, 3),
        tokens("text_encoders.clip_l.transformer.text_model.", 768),
    )
    assert set(found) == {
        f"{UNET}double_blocks.0.img_attn.qkv.weight",
        "vae.decoder.conv_in.weight",
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight",
    }


def test_the_positions_of_stable_diffusion_3_are_a_batch_of_one_again(known):
    for prefix in ("", UNET):
        found = known(
            f16(f"{prefix}pos_embed", 9, 64), f16(f"{prefix}joint_blocks.0.x_block.attn.qkv.weight", 8, 8)
        )
        positions = found[f"{prefix}pos_embed"]
        assert positions.shape == (1, 9, 64)
        assert torch.equal(positions.dequantize(torch.float32).view(-1), torch.arange(9 * 64).remainder(99))


@pytest.mark.parametrize("encoder", ["clip_l", "clip_g"])
def test_the_projections_of_stable_diffusion_3_keep_their_orientation(known, encoder):
    clip = f"text_encoders.{encoder}.transformer."
    found = known(
        f16(f"{UNET}joint_blocks.0.x_block.attn.qkv.weight", 8, 8),
        tokens(f"{clip}text_model.", 32),
        f16(f"{clip}text_model.text_projection", 32, 32),
    )
    assert f"{clip}text_projection.weight" in found
    assert not any("text_model.text_projection" in name for name in found)


@pytest.mark.parametrize("block", ["input_blocks.0.0.weight", "joint_blocks.0.x_block.attn.qkv.weight"])
def test_a_vae_that_was_given_beside_the_checkpoint_is_where_forge_looks_for_it(known, block):
    found = known(f16(UNET + block, 8, 8), f16("vae.decoder.conv_in.weight", 8, 4, 3, 3))
    assert "first_stage_model.decoder.conv_in.weight" in found


@pytest.mark.parametrize(
    ("width", "encoder", "prefix"),
    [
        (768, "clip_l", "cond_stage_model."),
        (1280, "clip_g", "conditioner.embedders.0.model."),
        (2048, "clip_l", "conditioner.embedders.0."),
        (2048, "clip_g", "conditioner.embedders.1.model."),
    ],
)
def test_text_encoders_that_were_given_beside_a_unet_are_where_forge_looks_for_them(
    known, width, encoder, prefix
):
    given = f"text_encoders.{encoder}.transformer."
    found = known(
        *unet(width),
        tokens(f"{given}text_model.", 32),
        f16(f"{given}text_model.text_projection", 32, 32),
    )
    assert f"{prefix}transformer.text_model.embeddings.token_embedding.weight" in found
    assert f"{prefix}transformer.text_projection.weight" in found


def test_a_vae_by_itself_loses_the_prefix_of_the_checkpoint_that_it_was_in(known):
    assert set(known(f16("first_stage_model.decoder.conv_in.weight", 8, 16, 3, 3))) == {
        "decoder.conv_in.weight"
    }


@pytest.mark.parametrize(("first", "second"), [("ffn_down", "ffn_up"), ("ffn_up", "ffn_down")])
def test_a_text_encoder_in_the_names_of_clip_cpp_gets_those_of_hugging_face(known, first, second):
    found = known(
        f16("t.token_embd.weight", 8, 32),
        f16("t.position_embd.weight", 7, 32),
        *(f16(f"t.blk.0.attn_{part}.weight", 32, 32) for part in ("q", "k", "v", "out")),
        *(f16(f"t.blk.0.{norm}.bias", 32) for norm in ("ln1", "ln2")),
        f16(f"t.blk.0.{first}.weight", 128, 32),
        f16(f"t.blk.0.{first}.bias", 128),
        f16(f"t.blk.0.{second}.weight", 32, 128),
        f16(f"t.blk.0.{second}.bias", 32),
        f16("t.post_ln.weight", 32),
        f16("text_projection.weight", 32, 32),
        f16("v.blk.0.attn_q.weight", 32, 32),
        f16("visual_projection.weight", 32, 32),
    )
    layer = "text_model.encoder.layers.0."
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "text_model.embeddings.token_embedding.weight": (8, 32),
        "text_model.embeddings.position_embedding.weight": (7, 32),
        **{f"{layer}self_attn.{part}_proj.weight": (32, 32) for part in ("q", "k", "v", "out")},
        f"{layer}layer_norm1.bias": (32,),
        f"{layer}layer_norm2.bias": (32,),
        f"{layer}mlp.fc1.weight": (128, 32),
        f"{layer}mlp.fc1.bias": (128,),
        f"{layer}mlp.fc2.weight": (32, 128),
        f"{layer}mlp.fc2.bias": (32,),
        "text_model.final_layer_norm.weight": (32,),
        "text_projection.weight": (32, 32),
    }


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("up_blocks.0.resnets.0.conv1.weight", "UNet with the tensor names of diffusers"),
        (
            "single_transformer_blocks.0.attn.to_q.weight",
            "Flux transformer with the tensor names of diffusers",
        ),
        ("v.blk.0.attn_q.weight", "vision encoder"),
        ("blk.0.attn_q.weight", "language model"),
    ],
)
def test_a_file_that_forge_cannot_use_is_called_what_it_is_and_what_to_take_is_said(name, says):
    reason = refusal({name: None})
    assert says in reason
    assert ": take " in reason


@pytest.mark.parametrize(
    "name",
    [
        "double_blocks.0.img_attn.qkv.weight",
        "input_blocks.0.0.weight",
        f"{UNET}input_blocks.0.0.weight",
        "enc.blk.0.attn_q.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "text_model.encoder.layers.0.layer_norm1.bias",
        "decoder.conv_in.weight",
        "decoder.up_blocks.0.resnets.0.conv1.weight",
        "down_blocks.0.resnets.0.conv1.weight",  # a ControlNet
    ],
)
def test_what_forge_knows_is_not_refused(name):
    assert refusal({name: None}) is None

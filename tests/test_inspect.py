"""`qswap inspect` says what a file is, whoever made it, and what to do with it."""

import json
import os
import struct

import pytest
from gguf_writer import Tensor, gguf_bytes

from lib_qswap import cli
from lib_qswap.quant.gguf_file import GGUFError, open_gguf
from lib_qswap.quant.inspect import format_report, inspect_file
from lib_qswap.quant.model_kind import UNKNOWN, describe

UNET = "model.diffusion_model."
TO_K = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
CLIP = "text_model.embeddings.token_embedding.weight"
VAE = {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}


def unet(width: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {f"{prefix}input_blocks.0.0.weight": (320, 4, 3, 3), f"{prefix}{TO_K}": (640, width)}


@pytest.mark.parametrize(
    ("shapes", "what", "use"),
    [
        ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "Flux transformer.", "CLIP-L, T5 and a VAE"),
        (
            {"double_blocks.0.img_attn.qkv.weight": (9216, 3072), "distilled_guidance_layer.x": (1,)},
            "Chroma transformer.",
            "T5 and a VAE",
        ),
        (unet(768), "Stable Diffusion 1 UNet.", "choose CLIP-L and a VAE"),
        (unet(2048), "SDXL UNet.", "choose CLIP-L, CLIP-G and a VAE"),
        (
            unet(768, UNET) | {f"cond_stage_model.transformer.{CLIP}": (49408, 768)} | VAE,
            "Stable Diffusion 1 UNet with CLIP-L text encoder and VAE.",
            "In Forge: a checkpoint.",
        ),
        (
            unet(2048, UNET)
            | {f"cond_stage_model.transformer.{CLIP}": (49408, 768)}
            | {f"cond_stage_model.1.transformer.{CLIP}": (49408, 1280)},
            "SDXL UNet with CLIP-L text encoder and CLIP-G text encoder.",
            "choose a VAE under",
        ),
        ({CLIP: (49408, 768)}, "CLIP-L text encoder.", "under VAE / Text Encoder"),
        ({"t.token_embd.weight": (49408, 1280), "t.blk.0.x": (1,)}, "CLIP-G text encoder.", "under VAE"),
        ({"enc.blk.0.attn_q.weight": (4096, 4096)}, "T5 text encoder.", "under VAE / Text Encoder"),
        ({"decoder.conv_in.weight": (512, 16, 3, 3)}, "VAE.", "under VAE / Text Encoder"),
        ({"lora_unet_x.lora_up.weight": (320, 8)}, "A LoRA.", "in the prompt"),
        ({"blk.0.attn_q.weight": (4096, 4096)}, "A language model.", "Forge does not know it: take the text"),
        ({"v.blk.0.attn_q.weight": (1024, 1024)}, "The vision encoder of", "take CLIP's text encoder"),
        ({"something.weight": (4, 4)}, UNKNOWN, ""),
    ],
)
def test_a_file_is_called_what_it_is(shapes, what, use):
    found = describe(shapes)
    assert found[0].startswith(what)
    assert use in found[1]


def test_the_report_begins_with_what_the_file_is(tmp_path):
    path = tmp_path / "t5.gguf"
    path.write_bytes(gguf_bytes([Tensor("enc.blk.0.attn_q.weight", (256, 256))]))
    lines = format_report(inspect_file(path)).splitlines()
    assert lines[2].strip() == "T5 text encoder."
    assert "general.architecture" not in "\n".join(lines), "what it is can be told without"


def safetensors_bytes(tensors: dict[str, tuple[str, list[int], int]], **other: object) -> bytes:
    """A file of zeros: (dtype, shape, bytes) by name."""
    header: dict[str, object] = dict(other)
    end = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


NF4 = {
    "double_blocks.0.img_attn.qkv.weight": ("U8", [2048, 1], 2048),
    "double_blocks.0.img_attn.qkv.weight.absmax": ("F32", [64], 256),
    "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4": ("U8", [80], 80),
    "double_blocks.0.norm.weight": ("BF16", [64], 128),
    "img_in.weight": ("F8_E4M3", [16, 64], 1024),
}


def test_a_safetensors_file_is_listed_by_the_types_that_its_weights_have(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(NF4, __metadata__={"format": "pt"}))
    report = inspect_file(path)
    json.dumps(report, allow_nan=False)
    types = {row["type"]: (row["tensors"], row["parameters"], row["bytes"]) for row in report["types"]}
    assert types["BNB_NF4"] == (1, 4096, 2048)
    assert types["F8_E4M3"] == (1, 1024, 1024)
    assert report["metadata"] == {"format": "pt"}
    assert report["tensors"][-1]["offset"] == os.path.getsize(path) - 1024
    assert cli.main(["inspect", os.fspath(path)]) == 0
    out, _ = capsys.readouterr()
    assert "safetensors, " in out
    assert "Flux transformer." in out


GOOD = safetensors_bytes(NF4)


@pytest.mark.parametrize(
    "content",
    [
        b"abc",
        GOOD[:100],
        GOOD[:-1],
        b"\xff" * 40,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 9) + b'{"a": 12}',
        struct.pack("<Q", 14) + b'{"a": {"x":1}}',
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        safetensors_bytes({"a": ("F32", [1], 4)}, __metadata__=3),
        safetensors_bytes({}, a={"dtype": "F32", "shape": None, "data_offsets": [0, 4]}),
        safetensors_bytes({}, a={"dtype": "F32", "shape": [1], "data_offsets": [-90, 4]}),
        safetensors_bytes({}, a={"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}),
        safetensors_bytes({}, a={"dtype": "F32", "shape": [1], "data_offsets": [0, float("inf")]}),
        safetensors_bytes({}, a={"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 62]}),
    ],
    ids=range(15),
)
def test_a_damaged_safetensors_file_is_refused_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=r"model\.safetensors"):
        inspect_file(path)
    assert cli.main(["inspect", os.fspath(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gguf_bytes([Tensor("a")]), "this is a GGUF file: rename it to .gguf"),
        (b"\n<!DOCTYPE html><html>", "this is a web page, not the file: download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "this is a Git LFS pointer: run `git lfs pull`"),
    ],
    ids=["gguf", "page", "pointer"],
)
def test_what_is_no_safetensors_file_is_called_what_it_is(tmp_path, content, says):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(GGUFError) as caught:
        inspect_file(path)
    assert str(caught.value) == f"{path}: {says}"


def test_a_safetensors_file_is_not_to_be_renamed_to_what_it_is_called(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    with pytest.raises(GGUFError, match="a safetensors file, where a GGUF file is needed"):
        open_gguf(path)
    path = path.rename(tmp_path / "model.gguf")
    with pytest.raises(GGUFError, match=r"rename it to \.safetensors"):
        inspect_file(path)


def test_a_safetensors_file_with_an_unprintable_name_is_listed(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"a\ud800\x1b[31m": ("F32", [1], 4)}))
    assert cli.main(["inspect", os.fspath(path)]) == 0
    out, _ = capsys.readouterr()
    assert "\x1b" not in out


@pytest.mark.parametrize(
    "names",
    [["token_embedding.weight"], ["x.attn2.to_k.weight", "input_blocks.0.0.weight"]],
    ids=["clip", "unet"],
)
def test_a_scalar_in_the_place_of_a_weight_is_a_tensor_like_others(names, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([Tensor(names[0], (), "F32"), *(Tensor(name) for name in names[1:])]))
    assert "scalar" in format_report(inspect_file(path))


def test_a_shape_beyond_all_numbers_is_said_all_the_same(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        safetensors_bytes({}, a={"dtype": "F32", "shape": [10**200, 10**200], "data_offsets": [0, 0]})
    )
    assert "parameters" in format_report(inspect_file(path))

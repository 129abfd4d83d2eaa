"""Files of other programs: their tensors under the names, and in the shapes, that Forge knows.

stable-diffusion.cpp converts whole checkpoints, and names every CLIP as Hugging Face does, whichever the
model has: `cond_stage_model.` for the first, `cond_stage_model.1.` for SDXL's second, `text_encoders.` for
those of Flux and Stable Diffusion 3, or whose files were given to it one by one. The projection is
`text_projection` in all of them; it keeps the orientation of the file that it came from, which is OpenCLIP's
in the checkpoints of Stable Diffusion 2 and SDXL, and Hugging Face's elsewhere. The linear layers around a
UNet's transformers are 1x1 convolutions there in some versions, and GGML drops a 1 in front of a shape.
clip.cpp, and llama.cpp after it, shorten CLIP's names: `t.blk.` for the text model, `v.blk.` for the vision
model. T5 in llama.cpp's names (`enc.blk.`) is known to Forge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lib_qswap.quant.model_kind import stranger
from lib_qswap.quant.packed import PackedTensor

_UNET = "model.diffusion_model."
_FIRST_CLIP = "cond_stage_model.transformer.text_model."
_SECOND_CLIP = "cond_stage_model.1.transformer.text_model."
_TOKENS = "embeddings.token_embedding.weight"
_VAES = ("first_stage_model.", "vae.")
_PROJECTION = ".transformer.text_model.text_projection"

# Widths of the text encoders that checkpoints have one of.
_CLIP_L, _CLIP_H, _CLIP_G = 768, 1024, 1280

# By the width of the text that a UNet sees: where Forge looks for text encoders that were given one by one.
_GIVEN_ENCODERS = {
    768: {"text_encoders.clip_l.": "cond_stage_model."},
    1280: {"text_encoders.clip_g.": "conditioner.embedders.0.model."},
    2048: {
        "text_encoders.clip_l.": "conditioner.embedders.0.",
        "text_encoders.clip_g.": "conditioner.embedders.1.model.",
    },
}

_AROUND_TRANSFORMER = re.compile(r"(.*\.)proj_(?:in|out)\.weight$")
_CONTEXT = re.compile(r".*input_blocks\..*\.attn2\.to_k\.weight$")

# clip.cpp's names of a text model's tensors, and Hugging Face's.
_CLIP_CPP = (
    (r"^t\.token_embd\.", "text_model.embeddings.token_embedding."),
    (r"^t\.position_embd\.", "text_model.embeddings.position_embedding."),
    (r"^t\.post_ln\.", "text_model.final_layer_norm."),
    (r"^t\.blk\.", "text_model.encoder.layers."),
    (r"\.attn_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attn_out\.", ".self_attn.out_proj."),
    (r"\.ln([12])\.", r".layer_norm\1."),
)
_FFN = re.compile(r"(text_model\.encoder\.layers\.)(\d+)\.(ffn_(?:up|down))\.(weight|bias)$")


def refusal(names: Mapping[str, object]) -> str | None:
    """Why Forge has no use for a file with tensors of these names, and what to take instead; None: it may
    have."""
    found = stranger(names)
    if found is None:
        return None
    return f"{found.what} ({found.names}), which Forge does not know: take {found.instead}"


def known_to_forge(tensors: Mapping[str, PackedTensor]) -> dict[str, PackedTensor]:
    """The tensors of a file as Forge looks for them; those of the usual files as they are."""
    if any(name.startswith("t.blk.") for name in tensors):
        return _from_clip_cpp(tensors)
    prefixes = _prefixes(tensors)
    renamed: dict[str, PackedTensor] = {}
    for name, tensor in tensors.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        known = prefixes.get(old, "") + name[len(old) :]
        if name.startswith("text_encoders."):
            known = known.replace(_PROJECTION, ".transformer.text_projection.weight")
        else:
            # OpenCLIP's name says that it has OpenCLIP's orientation.
            known = known.replace(f".model{_PROJECTION}", ".model.text_projection")
        if ".self_attn.in_proj." in known:
            for key, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[known.replace(".in_proj.", f".{key}_proj.")] = part  # type: ignore[assignment]
        else:
            renamed[known] = _in_its_shape(name, tensor, tensors)
    return renamed


def _prefixes(tensors: Mapping[str, PackedTensor]) -> dict[str, str]:
    """Prefixes of names, and Forge's in their place; the longer ones first."""
    if all(name.startswith(_VAES) for name in tensors):
        return dict.fromkeys(_VAES, "")  # A VAE by itself.
    if f"{_UNET}double_blocks.0.img_attn.qkv.weight" in tensors:  # Flux
        return {"first_stage_model.": "vae."}
    # By name: each tensor that is asked for is read.
    context = next((tensors[name].shape[-1] for name in tensors if _CONTEXT.match(name)), 0)
    return {
        "vae.": "first_stage_model.",
        **_GIVEN_ENCODERS.get(context, {}),
        **_converted_encoders(tensors),
    }


def _converted_encoders(tensors: Mapping[str, PackedTensor]) -> dict[str, str]:
    """The same for text encoders that were in the checkpoint of a UNet."""
    if _SECOND_CLIP + _TOKENS in tensors:
        return {
            "cond_stage_model.1.": "conditioner.embedders.1.model.",
            "cond_stage_model.": "conditioner.embedders.0.",
        }
    tokens = tensors.get(_FIRST_CLIP + _TOKENS)
    width = 0 if tokens is None else tokens.shape[-1]
    if width == _CLIP_H:  # Stable Diffusion 2
        return {"cond_stage_model.": "cond_stage_model.model."}
    if width == _CLIP_G:  # SDXL's refiner
        return {"cond_stage_model.": "conditioner.embedders.0.model."}
    return {}


def _in_its_shape(name: str, tensor: PackedTensor, tensors: Mapping[str, PackedTensor]) -> PackedTensor:
    """`tensor` in the shape that its layer has in all models of that kind.

    A 1x1 convolution before or after a UNet's transformer is a linear layer in all of them but Stable
    Diffusion 1; Forge tells them apart by that. The positions of Stable Diffusion 3 are a batch of one.
    """
    if name.removeprefix(_UNET) == "pos_embed" and tensor.dim() == 2:
        return _reshaped(tensor, (1, *tensor.shape))
    match = _AROUND_TRANSFORMER.match(name)
    if match is None or tensor.dim() != 4 or tensor.shape[2:] != (1, 1):
        return tensor
    keys = tensors.get(f"{match[1]}transformer_blocks.0.attn2.to_k.weight")
    if keys is None or keys.shape[-1] == _CLIP_L:
        return tensor
    return _reshaped(tensor, tensor.shape[:2])


def _reshaped(tensor: PackedTensor, shape: tuple[int, ...]) -> PackedTensor:
    return PackedTensor(tensor.packed, tensor.format, shape, tensor.dtype, tensor.source)


def _from_clip_cpp(tensors: Mapping[str, PackedTensor]) -> dict[str, PackedTensor]:
    """CLIP's text model; a vision model that is in the file as well is left out."""
    renamed: dict[str, PackedTensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(("v.", "mm.", "visual_projection.")):
            continue
        for pattern, replacement in _CLIP_CPP:
            name = re.sub(pattern, replacement, name)
        # clip.cpp calls the first layer ffn_down, others call it ffn_up: it is the one that widens.
        match = _FFN.match(name)
        if match is not None:
            matrix = tensors[f"t.blk.{match[2]}.{match[3]}.weight"]
            layer = "fc1" if matrix.shape[0] > matrix.shape[1] else "fc2"
            name = f"{match[1]}{match[2]}.mlp.{layer}.{match[4]}"
        renamed[name] = tensor
    return renamed

"""What a model file is, by the names and shapes of its tensors: metadata often say nothing, or the wrong
thing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_UNET = "model.diffusion_model."

# A diffusion model, by a tensor that it has, and what runs beside it; the first that fits.
_TRANSFORMERS = (
    ("distilled_guidance_layer.", ("Chroma transformer", "T5 and a VAE")),
    ("double_blocks.0.", ("Flux transformer", "CLIP-L, T5 and a VAE")),
    ("joint_blocks.0.", ("Stable Diffusion 3 transformer", "CLIP-L, CLIP-G, T5 and a VAE")),
)
# A UNet, by the width of the text that its attention sees.
_UNETS = {
    768: ("Stable Diffusion 1 UNet", "CLIP-L and a VAE"),
    1024: ("Stable Diffusion 2 UNet", "CLIP-H and a VAE"),
    1280: ("SDXL refiner UNet", "CLIP-G and a VAE"),
    2048: ("SDXL UNet", "CLIP-L, CLIP-G and a VAE"),
}
_UNKNOWN_UNET = ("UNet of an unknown model", "text encoders and a VAE")
_CLIPS = {768: "CLIP-L", 1024: "CLIP-H", 1280: "CLIP-G"}
_VAE_PREFIXES = ("", "first_stage_model.", "vae.")

# What no model of Forge can use, by how the name of one of its tensors begins: what it is, and what to take.
# (ControlNets, which Forge reads under diffusers' names, have no up_blocks.)
_STRANGERS = {
    "up_blocks.0.resnets.": (
        "a UNet with the tensor names of diffusers",
        "a file with the original names (input_blocks...)",
    ),
    "single_transformer_blocks.": (
        "a Flux transformer with the tensor names of diffusers",
        "a file with the original names (double_blocks...)",
    ),
    "v.blk.": (
        "the vision encoder of a language model (mmproj)",
        "CLIP's text encoder, as safetensors (clip_l.safetensors) or as GGUF",
    ),
    "blk.": (
        "a language model",
        "the text encoders that the checkpoint was made for: CLIP, and T5 for Flux (t5-v1_1-xxl-encoder)",
    ),
}


UNKNOWN = "Its tensors have the names of no model that is known here."


class Stranger(NamedTuple):
    """A file that Forge has no use for: what it is, by which names that shows, and what to take instead."""

    what: str
    names: str
    instead: str


def stranger(names: Mapping[str, object]) -> Stranger | None:
    """What makes a file with tensors of these names useless in Forge; None where nothing is known to."""
    if any(name.startswith("t.blk.") for name in names):  # CLIP's text model, whatever else there is
        return None
    for start, (what, instead) in _STRANGERS.items():
        if any(name.startswith(start) for name in names):
            return Stranger(what, f"{start}*", instead)
    return None


def describe(shapes: Mapping[str, Sequence[int]]) -> tuple[str, str]:
    """What a file is whose tensors have these shapes (rows first), and what to do with it in Forge; two
    sentences, the second of which may be empty."""
    if (found := stranger(shapes)) is not None:
        return _sentence(found.what), f"Forge does not know it: take {found.instead}."
    model = _diffusion_model(shapes)
    others = list(_text_encoders(shapes))
    if any(f"{prefix}decoder.conv_in.weight" in shapes for prefix in _VAE_PREFIXES):
        others.append("VAE")
    if any("lora_" in name for name in shapes):
        return "A LoRA.", "In Forge: name it in the prompt, <lora:NAME:1>."
    if model is None and not others:
        return UNKNOWN, ""
    if model is None:
        use = "In Forge: choose it under VAE / Text Encoder, beside a checkpoint."
        return _sentence(_listed(others)), use
    name, beside = model
    if not others:
        return _sentence(name), f"In Forge: a checkpoint; choose {beside} under VAE / Text Encoder."
    missing = "" if "VAE" in others else "; choose a VAE under VAE / Text Encoder"
    return _sentence(f"{name} with {_listed(others)}"), f"In Forge: a checkpoint{missing}."


def _sentence(what: str) -> str:
    return what[0].upper() + what[1:] + "."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _diffusion_model(shapes: Mapping[str, Sequence[int]]) -> tuple[str, str] | None:
    """(what it is, what runs beside it)"""
    names = [name.removeprefix(_UNET) for name in shapes]
    for start, what in _TRANSFORMERS:
        if any(name.startswith(start) for name in names):
            return what
    if "input_blocks.0.0.weight" not in names:
        return None
    widths = (shape[-1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight") and shape)
    return _UNETS.get(next(widths, 0), _UNKNOWN_UNET)


def _text_encoders(shapes: Mapping[str, Sequence[int]]) -> Iterator[str]:
    seen: set[str] = set()
    for name, shape in shapes.items():
        if name.endswith(("embeddings.token_embedding.weight", "t.token_embd.weight")) or (
            name.endswith("token_embedding.weight") and "text_model" not in name
        ):
            what = f"{_CLIPS.get(shape[-1] if shape else 0, 'CLIP')} text encoder"
        elif name.endswith(("enc.blk.0.attn_q.weight", "encoder.block.0.layer.0.SelfAttention.q.weight")):
            what = "T5 text encoder"
        else:
            continue
        if what not in seen:
            seen.add(what)
            yield what

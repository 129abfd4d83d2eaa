"""Transformers of Stable Diffusion 3 and Chroma, and whole checkpoints as stable-diffusion.cpp makes them,
with random weights, in a Forge folder:

    FORGE=WEBUI_FOLDER python make_checkpoints.py WHAT ...

WHAT: sd3:NAME:TYPE:DEPTH:LAYOUT (64 * DEPTH wide; LAYOUT is medium, as SD 3.5 medium with a second attention
in its first 13 blocks, or large), chroma:NAME:TYPE:DOUBLE:SINGLE (Chroma's width and those many blocks), and
sdcpp:MODEL:NAME:TYPE, MODEL being sd1, sd2, sdxl, sd3 or flux (small ones), with text encoders and VAE.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator

import numpy as np
import torch
from make_models import (
    BLOCKS,
    FLUX,
    SD1_SMALL,
    SD1_UNET,
    SD15,
    SDXL,
    SDXL_SMALL_UNET,
    ModelMaker,
    make_all,
    packed_rows,
    random_tensor,
    shapes_of,
)

SD2 = "stabilityai/stable-diffusion-2-1"
SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
SD2_UNET = {**SD1_UNET, **SD1_SMALL, "use_linear_in_transformer": True, "context_dim": 1024}
T5_WIDTH, POOLED_WIDTH = 4096, 2048

# What stable-diffusion.cpp and city96's converter leave as it is.
SDCPP_KEEPS = (
    *("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer."),
    *("x_embedder.", "t_embedder.", "y_embedder.", "pos_embed", "context_embedder."),
    *("time_embed.", "label_emb."),
)
CITY96_KEEPS = (*SDCPP_KEEPS, "distilled_guidance_layer.")

UNET, VAE = "model.diffusion_model.", "first_stage_model."
Shapes = dict[str, tuple[int, ...]]


class CheckpointMaker(ModelMaker):
    def make(self, what: str) -> None:
        torch.manual_seed(0)
        kind, *details = what.split(":")
        if kind == "sd3" and len(details) == 4:
            name, ggml_type, depth, layout = details
            self.transformer("sd3", name, self.sd3_shapes(int(depth), layout), ggml_type)
        elif kind == "chroma" and len(details) == 4:
            name, ggml_type, double, single = details
            self.transformer("flux", name, self.chroma_shapes(int(double), int(single)), ggml_type)
        elif kind == "sdcpp" and len(details) == 3:
            self.sdcpp(*details)
        else:
            sys.exit(
                f"make_checkpoints.py: {what} is none of the things it makes:{__doc__.partition('WHAT:')[2]}"
            )

    def sd3_shapes(self, depth: int, layout: str, prefix: str = "") -> Shapes:
        from backend.nn.mmditx import MMDiTX

        width = 64 * depth
        side = {"medium": 384, "large": 192}[layout]
        with torch.device("meta"):
            model = MMDiTX(
                input_size=None,
                in_channels=16,
                depth=depth,
                adm_in_channels=POOLED_WIDTH,
                context_embedder_config={
                    "target": "torch.nn.Linear",
                    "params": {"in_features": T5_WIDTH, "out_features": width},
                },
                pos_embed_max_size=side,
                num_patches=side * side,
                qk_norm="rms",
            )
        return shapes_of(model, prefix)

    def chroma_shapes(self, double: int, single: int) -> Shapes:
        from backend.nn.chroma import IntegratedChromaTransformer2DModel as Chroma

        with torch.device("meta"):
            model = Chroma(
                in_channels=16,
                vec_in_dim=768,
                context_in_dim=T5_WIDTH,
                hidden_size=3072,
                mlp_ratio=4.0,
                num_heads=24,
                depth=double,
                depth_single_blocks=single,
                axes_dim=[16, 56, 56],
                theta=10000,
                qkv_bias=True,
                guidance_out_dim=3072,
                guidance_hidden_dim=5120,
                guidance_n_layers=5,
            )
        return shapes_of(model)

    def flux_shapes(self, prefix: str) -> Shapes:
        from backend.nn.flux import IntegratedFluxTransformer2DModel as Flux

        with torch.device("meta"):
            model = Flux(
                in_channels=16,
                vec_in_dim=768,
                context_in_dim=T5_WIDTH,
                hidden_size=256,
                mlp_ratio=4.0,
                num_heads=2,
                depth=2,
                depth_single_blocks=4,
                axes_dim=[16, 56, 56],
                theta=10000,
                qkv_bias=True,
                guidance_embed=True,
            )
        return shapes_of(model, prefix)

    def t5_shapes(self, prefix: str) -> Shapes:
        """With as many layers as its config.json says."""
        from backend.nn.t5 import IntegratedT5

        config = json.loads((self.configs / FLUX / "text_encoder_2" / "config.json").read_text())
        with torch.device("meta"):
            shapes = shapes_of(IntegratedT5(config), prefix)
        return {name: shape for name, shape in shapes.items() if ".encoder." in name or ".shared." in name}

    def transformer(self, arch: str, name: str, shapes: Shapes, ggml_type: str) -> None:
        """A transformer by itself, as city96's converter and llama-quantize make it."""
        rng = np.random.default_rng(0)
        tensors = []
        for tensor_name, shape in shapes.items():
            is_matrix = len(shape) == 2 and not any(part in tensor_name for part in CITY96_KEEPS)
            tensors.append((tensor_name, *stored(rng, tensor_name, shape, ggml_type if is_matrix else None)))
        self.save_gguf(arch, f"Stable-diffusion/{name}", tensors)

    def sdcpp(self, model: str, name: str, ggml_type: str) -> None:
        """A checkpoint as stable-diffusion.cpp makes it: whatever consists of whole blocks is quantized,
        norms as well; linear layers around a UNet's transformers are 1x1 convolutions; every CLIP has Hugging
        Face's names; a 1 in front of a shape is gone."""
        rng = np.random.default_rng(0)
        per_block = BLOCKS[ggml_type][0]
        tensors = []
        for tensor_name, shape in self.sdcpp_shapes(model).items():
            if tensor_name.endswith(("proj_in.weight", "proj_out.weight")) and len(shape) == 2:
                shape = (*shape, 1, 1)
            if shape[:1] == (1,) and len(shape) > 1:
                shape = shape[1:]
            is_whole = shape[-1:] and shape[-1] % per_block == 0
            is_kept = tensor_name.endswith((".bias", ".scale")) or any(
                part in tensor_name for part in SDCPP_KEEPS
            )
            kind = ggml_type if is_whole and not is_kept else None
            tensors.append((tensor_name, *stored(rng, tensor_name, shape, kind)))
        self.save_gguf(model, f"Stable-diffusion/{name}", tensors)

    def sdcpp_shapes(self, model: str) -> Shapes:
        first, second = "cond_stage_model.transformer.", "cond_stage_model.1.transformer."
        unets = {"sd1": {**SD1_UNET, **SD1_SMALL}, "sd2": SD2_UNET, "sdxl": SDXL_SMALL_UNET}
        if model in unets:
            shapes = self.unet_shapes(UNET, **unets[model]) | self.vae_shapes(SD15, VAE)
            shapes |= self.clip_shapes(SD2 if model == "sd2" else SD15, first)
            if model == "sdxl":
                shapes |= projected(self.clip_shapes(SDXL, second, "text_encoder_2"))
            return shapes
        encoders = "text_encoders."
        shapes = projected(self.clip_shapes(SD3, f"{encoders}clip_l.transformer."))
        shapes |= self.t5_shapes(f"{encoders}t5xxl.")
        if model == "flux":
            return self.flux_shapes(UNET) | shapes | self.vae_shapes(FLUX, VAE)
        shapes |= projected(self.clip_shapes(SD3, f"{encoders}clip_g.transformer.", "text_encoder_2"))
        return self.sd3_shapes(8, "large", UNET) | shapes | self.vae_shapes(SD3, VAE)


def projected(shapes: Shapes) -> Shapes:
    """A CLIP's shapes, with its projection under the name that stable-diffusion.cpp gives it."""
    return {
        name.replace("text_projection.weight", "text_model.text_projection"): shape
        for name, shape in shapes.items()
    }


def stored(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], ggml_type: str | None
) -> Iterator[object]:
    """A random tensor as `save_gguf` takes it: the array, and its GGML type; None: F16, vectors F32."""
    if ggml_type is None:
        values = random_tensor(name, shape)
        return iter(((values if len(shape) < 2 else values.half()).numpy(), None))
    is_embedding = "embedding" in name
    std = 1.0 if len(shape) == 1 or "shared" in name else 0.02 if is_embedding else 0.7 / math.sqrt(shape[-1])
    return iter((packed_rows(rng, shape, ggml_type, std), ggml_type))


def main() -> None:
    if "FORGE" not in os.environ or len(sys.argv) < 2:
        sys.exit("make_checkpoints.py: set FORGE to the folder of the web UI, and name what to make")
    make_all(CheckpointMaker, sys.argv[1:])


if __name__ == "__main__":
    main()

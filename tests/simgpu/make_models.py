"""Makes small models with random weights that Forge loads, in its models folder:

    FORGE=WEBUI_FOLDER python make_models.py [WHAT ...]

WHAT: sd15, sd15mini, fluxaux (VAE, CLIP and T5 for Flux), t5q8 (fluxaux's T5 as GGUF), lora,
flux:NAME:TYPE:HIDDEN:DOUBLE:SINGLE (a Flux transformer as GGUF); a standard set by default. As GGUF with a
TYPE for the weights, and only when asked for: unet:sd1:NAME:TYPE, unet:sdxl:NAME:TYPE (small UNets,
with :F16 at the end for convolutions that are not quantized, in their own shape), unet:sdxlfull:NAME:TYPE
(SDXL's own sizes: 2.6 G weights),
clip:l:NAME:TYPE, clip:g:NAME:TYPE (clipcpp: under clip.cpp's names),
t5:NAME:TOKEN_EMBD_TYPE:NORM_TYPE; and sdvae, the UNets' VAE.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

MIB = 1 << 20
SD15 = "runwayml/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
FLUX = "black-forest-labs/FLUX.1-dev"
STANDARD = (
    "sd15",
    "sd15mini",
    "fluxaux",
    "t5q8",
    "lora",
    *(
        f"flux:flux_rand_{name.lower()}:{name}:3072:1:2"
        for name in ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS")
    ),
    *(f"flux:flux_tiny_{name.lower()}:{name}:256:2:4" for name in ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS")),
)

# Elements per block, then the block's fields in file order (the GGUF specification's structs): an int is
# that many random bytes; a float is an fp16 scale, in units that give the unpacked weights a standard
# deviation of one.
BLOCKS: dict[str, tuple[int, tuple[int | float, ...]]] = {
    "Q4_0": (32, (1 / 4.6, 16)),
    "Q4_1": (32, (1 / 4.6, -7.5 / 4.6, 16)),
    "Q5_0": (32, (1 / 9.2, 4, 16)),
    "Q5_1": (32, (1 / 9.2, -15.5 / 9.2, 4, 16)),
    "Q8_0": (32, (1 / 74, 32)),
    "Q2_K": (256, (16, 64, 1 / 14.4, 1.5 / 14.4)),
    "Q3_K": (256, (32, 64, 12, 1 / 43)),
    "Q4_K": (256, (1 / 264, 7.5 / 264, 12, 128)),
    "Q5_K": (256, (1 / 540, 15.5 / 540, 12, 32, 128)),
    "Q6_K": (256, (128, 64, 16, 1 / 1370)),
    "IQ4_XS": (256, (1 / 1246, 2, 4, 128)),  # d, scales_h, scales_l, qs
}

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

COMMON_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
}
SD1_UNET = {**COMMON_UNET, "use_linear_in_transformer": False, "context_dim": 768, "num_heads": 8}
SD1_MINI = {
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "channel_mult": [1, 1],
}
# Forge tells from block 4 for which text encoder a UNet without one is.
SD1_SMALL = {
    "num_res_blocks": [2, 2],
    "transformer_depth": [1, 1, 1, 1],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1],
    "channel_mult": [1, 2],
}
# As SDXL, but for the transformer blocks: Forge knows it by [0, 0, 2, 2, 10, 10] and has to be told.
SDXL_SMALL_UNET = {
    **COMMON_UNET,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_head_channels": 64,
    "num_heads": -1,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
}

SDXL_UNET = {
    **SDXL_SMALL_UNET,
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}
UNETS = {"sd1": {**SD1_UNET, **SD1_SMALL}, "sdxl": SDXL_SMALL_UNET, "sdxlfull": SDXL_UNET}

# City96's names for T5's tensors; applied in this order.
T5_NAMES = (
    ("shared", "token_embd"),
    ("encoder.", "enc."),
    (".block.", ".blk."),
    ("final_layer_norm", "output_norm"),
    ("layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"),
    ("layer.0.SelfAttention.", "attn_"),
    ("layer.0.layer_norm", "attn_norm"),
    ("layer.1.DenseReluDense.wi_1", "ffn_up"),
    ("layer.1.DenseReluDense.wi_0", "ffn_gate"),
    ("layer.1.DenseReluDense.wo", "ffn_down"),
    ("layer.1.layer_norm", "ffn_norm"),
)


# clip.cpp's names for CLIP's tensors; applied in this order.
CLIP_CPP_NAMES = (
    ("text_model", "t"),
    ("encoder.layers", "blk"),
    ("embeddings.", ""),
    ("_proj", ""),
    ("self_attn.", "attn_"),
    ("layer_norm", "ln"),
    ("mlp.fc1", "ffn_down"),
    ("mlp.fc2", "ffn_up"),
    ("embedding", "embd"),
    ("final", "post"),
)


def enter_webui(folder: Path) -> None:
    """Makes Forge's modules importable, on the CPU."""
    sys.argv = [sys.argv[0], "--always-cpu"]
    os.chdir(folder)
    sys.path[0:1] = [
        str(folder / part) for part in ("", "packages_3rdparty", "repositories/huggingface_guess")
    ]


def report(path: Path) -> None:
    print(f"{path}: {path.stat().st_size / MIB:.1f} MiB")


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values that keep activations finite through a whole model: fan-in scaled weights, unit norms, zero
    biases."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "bias":
        return torch.zeros(shape)
    if leaf == "scale" or (len(shape) == 1 and leaf == "weight"):
        return torch.ones(shape)
    if not shape:
        return torch.tensor(4.6)  # CLIP's logit scale
    if "position_embedding" in name or "token_embedding" in name:
        return torch.randn(shape) * 0.02
    if "shared" in name:  # T5's embedding
        return torch.randn(shape)
    return torch.randn(shape) * (0.7 / math.sqrt(math.prod(shape[1:]) or 1))


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: random_tensor(name, shape).half().contiguous() for name, shape in shapes.items()}


def random_blocks(rng: np.random.Generator, elements: int, ggml_type: str, std: float) -> np.ndarray:
    """Packed weights of random content, (blocks, bytes per block) uint8: no quantizer is needed."""
    per_block, fields = BLOCKS[ggml_type]
    blocks = elements // per_block
    parts = []
    for field in fields:
        if isinstance(field, int):
            parts.append(rng.integers(0, 256, (blocks, field), dtype=np.uint8))
        else:
            scale = field * std * rng.uniform(0.8, 1.2, (blocks, 1))
            parts.append(scale.astype(np.float16).view(np.uint8))
    return np.concatenate(parts, axis=1)


def packed_rows(rng: np.random.Generator, shape: tuple[int, ...], ggml_type: str, std: float) -> np.ndarray:
    """A random tensor of any type in its bytes, (..., bytes per row) uint8."""
    if ggml_type in PLAIN:
        return plain_bytes(torch.from_numpy(rng.standard_normal(shape, np.float32)) * std, ggml_type)
    blocks = random_blocks(rng, math.prod(shape), ggml_type, std)
    return blocks.reshape(*shape[:-1], shape[-1] // BLOCKS[ggml_type][0] * blocks.shape[1])


def plain_bytes(values: torch.Tensor, ggml_type: str) -> np.ndarray:
    return values.to(PLAIN[ggml_type]).contiguous().view(torch.uint8).numpy()


def q8_0_blocks(weight: torch.Tensor) -> np.ndarray:
    """A 2-D weight as Q8_0 rows, uint8: blocks of an fp16 scale and 32 int8."""
    blocks = weight.float().numpy().reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    quants = np.round(blocks / np.where(scale > 0, scale, 1)).astype(np.int8)
    packed = np.concatenate([scale.astype(np.float16).view(np.uint8), quants.view(np.uint8)], axis=1)
    return packed.reshape(weight.shape[0], -1)


def shapes_of(model: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(value.shape) for name, value in model.state_dict().items()}


class ModelMaker:
    """Makes models in one Forge folder; every model from the same seed, so that they can be made one by
    one."""

    def __init__(self, webui: Path) -> None:
        self.configs = webui / "backend" / "huggingface"
        self.models = webui / "models"

    def make(self, what: str) -> None:
        """One of the names in this file's description."""
        torch.manual_seed(0)
        kind, *details = what.split(":")
        if kind == "flux" and len(details) == 5:
            name, ggml_type, *sizes = details
            self.flux(name, ggml_type, *map(int, sizes))
        elif kind in ("sd15", "sd15mini", "sdvae", "fluxaux", "t5q8", "lora") and not details:
            getattr(self, kind)()
        elif (kind, len(details)) in (
            ("unet", 3),
            ("unet", 4),
            ("clip", 3),
            ("clipcpp", 3),
            ("t5", 3),
        ):
            getattr(self, kind)(*details)
        else:
            sys.exit(f"make_models.py: {what} is none of the things it makes:{__doc__.partition('WHAT:')[2]}")

    def save(self, state: dict[str, torch.Tensor], name: str) -> None:
        path = self.models / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(state, path)
        report(path)

    def save_gguf(self, arch: str, name: str, tensors) -> None:
        """tensors: (name, array, GGML type or None for the array's own dtype[, shape to note])."""
        import gguf

        path = self.models / f"{name}.gguf"
        writer = gguf.GGUFWriter(str(path), arch)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for tensor_name, array, ggml_type, *noted in tensors:
            raw = None if ggml_type is None else gguf.GGMLQuantizationType[ggml_type]
            for shape in noted:
                writer.add_array(f"comfy.gguf.orig_shape.{tensor_name}", list(shape))
            writer.add_tensor(tensor_name, array, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        report(path)

    def vae_shapes(self, repository: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
        from backend.nn.vae import IntegratedAutoencoderKL as Vae

        with torch.device("meta"):
            vae = Vae.from_config(Vae.load_config(str(self.configs / repository / "vae")))
        return shapes_of(vae, prefix)

    def clip_shapes(
        self, repository: str, prefix: str = "", folder: str = "text_encoder"
    ) -> dict[str, tuple[int, ...]]:
        import transformers

        config = transformers.CLIPTextConfig.from_pretrained(str(self.configs / repository / folder))
        with torch.device("meta"):
            clip = getattr(transformers, config.architectures[0])(config)
        return shapes_of(clip, prefix)

    def unet_shapes(self, prefix: str = "", **config) -> dict[str, tuple[int, ...]]:
        from backend.nn.unet import IntegratedUNet2DConditionModel as UNet

        with torch.device("meta"):
            unet = UNet.from_config(config)
        return shapes_of(unet, prefix)

    def sd15(self) -> None:
        """Stable Diffusion 1.5, whole: 2 GB."""
        self._sd15(
            "sd15_rand",
            num_res_blocks=[2, 2, 2, 2],
            transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
            transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            channel_mult=[1, 2, 4, 4],
        )

    def sd15mini(self) -> None:
        """Two levels of it: 0.5 GB."""
        self._sd15("sd15_mini_rand", **SD1_MINI)

    def _sd15(self, name: str, **levels) -> None:
        shapes = self.unet_shapes("model.diffusion_model.", **SD1_UNET, **levels)
        shapes |= self.vae_shapes(SD15, "first_stage_model.")
        shapes |= self.clip_shapes(SD15, "cond_stage_model.transformer.")
        self.save(random_state(shapes), f"Stable-diffusion/{name}")

    def fluxaux(self) -> None:
        """Flux's VAE and text encoders; T5 has as many layers as its config.json says."""
        from backend.nn.t5 import IntegratedT5

        self.save(random_state(self.vae_shapes(FLUX)), "VAE/flux_ae_rand")
        self.save(random_state(self.clip_shapes(FLUX)), "text_encoder/clip_l_rand")
        config = json.loads((self.configs / FLUX / "text_encoder_2" / "config.json").read_text())
        with torch.device("meta"):
            t5 = IntegratedT5(config)
        prefix = "transformer."
        shapes = {name[len(prefix) :]: s for name, s in shapes_of(t5).items() if name.startswith(prefix)}
        self.save(random_state(shapes), "text_encoder/t5xxl_rand")

    def t5q8(self) -> None:
        """fluxaux's T5 as a Q8_0 GGUF; norms and the relative attention bias stay F32, as in published
        files."""

        def tensors():
            for name, weight in load_file(self.models / "text_encoder/t5xxl_rand.safetensors").items():
                if name == "encoder.embed_tokens.weight":  # the same as `shared`
                    continue
                for old, new in T5_NAMES:
                    name = name.replace(old, new)
                if weight.ndim == 2 and "attn_rel_b" not in name:
                    yield name, q8_0_blocks(weight), "Q8_0"
                else:
                    yield name, weight.float().numpy(), None

        self.save_gguf("t5encoder", "text_encoder/t5xxl_rand_q8_0", tensors())

    def sdvae(self) -> None:
        self.save(random_state(self.vae_shapes(SD15)), "VAE/sd_vae_rand")

    def unet(self, arch: str, name: str, ggml_type: str, conv_type: str | None = None) -> None:
        """A UNet as city96's converter and llama-quantize make it: everything but vectors and small tensors
        in one type; rows that are no whole number of 256 become rows of 256, and the shape is noted.

        With `conv_type` as stable-diffusion.cpp makes it: convolutions in that type, and no other shapes.
        """
        tensors = self._unet_tensors(arch, ggml_type, conv_type)
        self.save_gguf(arch.removesuffix("full"), f"Stable-diffusion/{name}", tensors)

    def _unet_tensors(self, arch: str, ggml_type: str, conv_type: str | None):
        shapes = self.unet_shapes(**UNETS[arch])
        rng = np.random.default_rng(0)
        for tensor_name, shape in shapes.items():
            elements = math.prod(shape)
            if len(shape) == 1 or elements <= 1024 or elements % 256:
                yield tensor_name, random_tensor(tensor_name, shape).numpy(), None
                continue
            std = 0.7 / math.sqrt(math.prod(shape[1:]))
            if conv_type and len(shape) == 4:
                yield tensor_name, packed_rows(rng, shape, conv_type, std), conv_type
            elif shape[-1] % 256 and not conv_type:
                rows = packed_rows(rng, (elements // 256, 256), ggml_type, std)
                yield tensor_name, rows, ggml_type, shape
            else:
                yield tensor_name, packed_rows(rng, shape, ggml_type, std), ggml_type

    def clip(self, size: str, name: str, ggml_type: str) -> None:
        """CLIP-L or CLIP-G under Hugging Face's names, with every matrix in one type."""
        self.save_gguf("clip", f"text_encoder/{name}", self._clip_tensors(size, ggml_type))

    def _clip_tensors(self, size: str, ggml_type: str):
        shapes = self.clip_shapes(SD15) if size == "l" else self.clip_shapes(SDXL, folder="text_encoder_2")
        rng = np.random.default_rng(0)
        for tensor_name, shape in shapes.items():
            if len(shape) != 2:
                yield tensor_name, random_tensor(tensor_name, shape).numpy(), None
                continue
            std = 0.02 if "embedding" in tensor_name else 0.7 / math.sqrt(shape[1])
            yield tensor_name, packed_rows(rng, shape, ggml_type, std), ggml_type

    def clipcpp(self, size: str, name: str, ggml_type: str) -> None:
        """The same as clip.cpp names it."""

        def tensors():
            for tensor_name, *rest in self._clip_tensors(size, ggml_type):
                for old, new in CLIP_CPP_NAMES if "projection" not in tensor_name else ():
                    tensor_name = tensor_name.replace(old, new)
                yield tensor_name, *rest

        self.save_gguf("clip", f"text_encoder/{name}", tensors())

    def t5(self, name: str, embedding_type: str, norm_type: str) -> None:
        """fluxaux's T5 as t5q8 makes it, with token_embd and the norms in other types."""
        rng = np.random.default_rng(0)

        def tensors():
            for tensor_name, weight in load_file(self.models / "text_encoder/t5xxl_rand.safetensors").items():
                if tensor_name == "encoder.embed_tokens.weight":
                    continue
                for old, new in T5_NAMES:
                    tensor_name = tensor_name.replace(old, new)
                if "token_embd" in tensor_name:
                    yield tensor_name, packed_rows(rng, weight.shape, embedding_type, 1.0), embedding_type
                elif weight.ndim == 1:
                    if norm_type in PLAIN:
                        yield tensor_name, plain_bytes(weight, norm_type), norm_type
                    else:
                        yield tensor_name, packed_rows(rng, weight.shape, norm_type, 1.0), norm_type
                elif "attn_rel_b" in tensor_name:
                    yield tensor_name, weight.float().numpy(), None
                else:
                    yield tensor_name, q8_0_blocks(weight), "Q8_0"

        self.save_gguf("t5encoder", f"text_encoder/{name}", tensors())

    def flux(self, name: str, ggml_type: str, hidden: int, double: int, single: int) -> None:
        """A Flux transformer of that width and those many blocks; what is outside the blocks is F16 and
        F32."""
        import gguf
        from backend.nn.flux import IntegratedFluxTransformer2DModel

        with torch.device("meta"):
            model = IntegratedFluxTransformer2DModel(
                in_channels=16,
                vec_in_dim=768,
                context_in_dim=4096,
                hidden_size=hidden,
                mlp_ratio=4.0,
                num_heads=hidden // 128,
                depth=double,
                depth_single_blocks=single,
                axes_dim=[16, 56, 56],
                theta=10000,
                qkv_bias=True,
                guidance_embed=True,
            )
        rng = np.random.default_rng(0)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ggml_type]]

        def tensors():
            for tensor_name, shape in shapes_of(model).items():
                if len(shape) == 2 and tensor_name.startswith(("double_blocks", "single_blocks")):
                    rows, columns = shape
                    blocks = random_blocks(rng, rows * columns, ggml_type, 0.5 / math.sqrt(columns))
                    # the writer turns the shape of 2-D uint8 rows into the shape in elements
                    yield tensor_name, blocks.reshape(rows, columns // per_block * block_bytes), ggml_type
                else:
                    values = random_tensor(tensor_name, shape).numpy()
                    yield tensor_name, values.astype(np.float16) if len(shape) == 2 else values, None

        self.save_gguf("flux", f"Stable-diffusion/{name}", tensors())

    def lora(self) -> None:
        """LoRAs in kohya's naming for flux_rand_*, flux_tiny_* and sd15_rand."""
        for name, hidden in (("flux_lora_rand", 3072), ("flux_tiny_lora_rand", 256)):
            self._lora(
                name,
                {
                    "unet_double_blocks_0_img_attn_qkv": (3 * hidden, hidden),
                    "unet_double_blocks_0_img_mlp_0": (4 * hidden, hidden),
                    "unet_double_blocks_0_txt_attn_proj": (hidden, hidden),
                    "unet_double_blocks_0_img_mod_lin": (6 * hidden, hidden),
                    "unet_single_blocks_0_linear1": (7 * hidden, hidden),
                    "unet_single_blocks_1_linear2": (hidden, 5 * hidden),
                },
            )
        sd15 = {
            "unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0": (1280, 1280),
            "te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
            "te_text_model_encoder_layers_5_mlp_fc1": (3072, 768),
        }
        for level, width in enumerate((320, 640)):
            block = f"unet_down_blocks_{level}_attentions_0_transformer_blocks_0_"
            sd15[block + "attn1_to_q"] = (width, width)
            sd15[block + "attn2_to_k"] = (width, 768)
            sd15[block + "ff_net_0_proj"] = (8 * width, width)
        self._lora("sd15_lora_rand", sd15)

    def _lora(self, name: str, layers: dict[str, tuple[int, int]], rank: int = 8) -> None:
        state = {}
        for layer, (rows, columns) in layers.items():
            state[f"lora_{layer}.lora_down.weight"] = (torch.randn(rank, columns) / math.sqrt(columns)).half()
            state[f"lora_{layer}.lora_up.weight"] = (torch.randn(rows, rank) * 0.15).half()
            state[f"lora_{layer}.alpha"] = torch.tensor(float(rank)).half()
        self.save(state, f"Lora/{name}")


def main() -> None:
    if "FORGE" not in os.environ:
        sys.exit("make_models.py: set FORGE to the folder of the web UI (the one with launch.py)")
    wanted = sys.argv[1:] or STANDARD
    make_all(ModelMaker, wanted)


def make_all(kind: type[ModelMaker], wanted: Sequence[str]) -> None:
    """Makes everything that is named in the web UI's folder, $FORGE."""
    webui = Path(os.environ["FORGE"]).resolve()
    enter_webui(webui)
    maker = kind(webui)
    for what in wanted:
        maker.make(what)


if __name__ == "__main__":
    main()

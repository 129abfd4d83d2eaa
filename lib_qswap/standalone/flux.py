"""A Flux-shaped transformer of plain `nn.Linear` layers, built from whatever a Flux-family GGUF file holds.

Architecture as published with FLUX.1 (double-stream blocks that modulate image and text tokens separately,
then single-stream blocks over both), parameters named as in the black-forest-labs checkpoints. Every
dimension is read off the tensors' shapes, so that dev, schnell, Fill and pruned variants load into the same
classes. Nothing here knows of swapping: `lib_qswap.attach` replaces the forwards of the linear layers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_qswap.quant.gguf_file import GGUFError
from lib_qswap.quant.packed import PackedTensor

# Whole checkpoints keep the transformer under this prefix.
CHECKPOINT_PREFIX = "model.diffusion_model."
TIME_EMBEDDING = 256
ROPE_THETA = 10_000.0
MISSING_SHOWN = 4


class FluxShape(NamedTuple):
    """The dimensions of one Flux-family transformer, in channels where a field does not say otherwise."""

    hidden: int = 768
    head_dim: int = 128
    mlp: int = 3072
    double_blocks: int = 19  # number of blocks
    single_blocks: int = 38  # number of blocks
    in_channels: int = 64  # per token: latent channels times the 2x2 patch, and image conditioning (Fill)
    out_channels: int = 64
    context: int = 4096  # per text token
    vector: int = 768  # of the pooled text embedding
    guidance: bool = True  # whether the distilled guidance scale is embedded (dev: yes, schnell: no)

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim


class RMSNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (normed * self.scale.float()).to(x.dtype)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(query), self.key_norm(key)


class Embedder(nn.Module):
    """One vector (time step, guidance, pooled text) to the width of the blocks."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(channels, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """The `parts` vectors (shift, scale, gate, ...) that steer one block, each (batch, 1, hidden)."""

    def __init__(self, hidden: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(hidden, parts * hidden)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vector))[:, None, :].chunk(self.parts, dim=-1)


class SelfAttention(nn.Module):
    """Holds one stream's projections; the attention itself runs over both streams, in `DoubleBlock`."""

    def __init__(self, hidden: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.norm = QKNorm(head_dim)
        self.proj = nn.Linear(hidden, hidden)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = split_heads(self.qkv(x), self.head_dim)
        query, key = self.norm(query, key)
        return query, key, value


def feed_forward(hidden: int, mlp: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, mlp), nn.GELU(approximate="tanh"), nn.Linear(mlp, hidden))


class DoubleBlock(nn.Module):
    def __init__(self, shape: FluxShape) -> None:
        super().__init__()
        hidden, mlp = shape.hidden, shape.mlp
        self.img_mod = Modulation(hidden, 6)
        self.img_attn = SelfAttention(hidden, shape.head_dim)
        self.img_mlp = feed_forward(hidden, mlp)
        self.txt_mod = Modulation(hidden, 6)
        self.txt_attn = SelfAttention(hidden, shape.head_dim)
        self.txt_mlp = feed_forward(hidden, mlp)

    def forward(self, img: Tensor, txt: Tensor, vector: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        img_shift, img_scale, img_gate, img_mlp_shift, img_mlp_scale, img_mlp_gate = self.img_mod(vector)
        txt_shift, txt_scale, txt_gate, txt_mlp_shift, txt_mlp_scale, txt_mlp_gate = self.txt_mod(vector)

        img_query, img_key, img_value = self.img_attn.heads(modulate(img, img_shift, img_scale))
        txt_query, txt_key, txt_value = self.txt_attn.heads(modulate(txt, txt_shift, txt_scale))
        attended = attention(
            torch.cat((txt_query, img_query), dim=2),
            torch.cat((txt_key, img_key), dim=2),
            torch.cat((txt_value, img_value), dim=2),
            rotation,
        )
        txt_attended, img_attended = attended.split((txt.shape[1], img.shape[1]), dim=1)

        img = img + img_gate * self.img_attn.proj(img_attended)
        img = img + img_mlp_gate * self.img_mlp(modulate(img, img_mlp_shift, img_mlp_scale))
        txt = txt + txt_gate * self.txt_attn.proj(txt_attended)
        txt = txt + txt_mlp_gate * self.txt_mlp(modulate(txt, txt_mlp_shift, txt_mlp_scale))
        return img, txt


class SingleBlock(nn.Module):
    """Attention and MLP side by side: one layer makes the inputs of both, another joins their outputs."""

    def __init__(self, shape: FluxShape) -> None:
        super().__init__()
        hidden, mlp = shape.hidden, shape.mlp
        self.widths = (3 * hidden, mlp)
        self.head_dim = shape.head_dim
        self.linear1 = nn.Linear(hidden, 3 * hidden + mlp)
        self.linear2 = nn.Linear(hidden + mlp, hidden)
        self.norm = QKNorm(shape.head_dim)
        self.modulation = Modulation(hidden, 3)

    def forward(self, x: Tensor, vector: Tensor, rotation: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vector)
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split(self.widths, dim=-1)
        query, key, value = split_heads(qkv, self.head_dim)
        query, key = self.norm(query, key)
        attended = attention(query, key, value, rotation)
        return x + gate * self.linear2(torch.cat((attended, F.gelu(mlp, approximate="tanh")), dim=-1))


class FinalLayer(nn.Module):
    def __init__(self, shape: FluxShape) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.hidden, shape.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(shape.hidden, 2 * shape.hidden))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vector)[:, None, :].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class FluxTransformer(nn.Module):
    """Predicts the flow of a latent: image tokens, text, pooled text and time to a vector per token."""

    def __init__(self, shape: FluxShape) -> None:
        super().__init__()
        self.shape = shape
        self.img_in = nn.Linear(shape.in_channels, shape.hidden)
        self.time_in = Embedder(TIME_EMBEDDING, shape.hidden)
        self.vector_in = Embedder(shape.vector, shape.hidden)
        self.guidance_in = Embedder(TIME_EMBEDDING, shape.hidden) if shape.guidance else None
        self.txt_in = nn.Linear(shape.context, shape.hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(shape) for _ in range(shape.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(shape) for _ in range(shape.single_blocks))
        self.final_layer = FinalLayer(shape)

    def forward(
        self, img: Tensor, txt: Tensor, pooled: Tensor, time: Tensor, rotation: Tensor, guidance: Tensor
    ) -> Tensor:
        """One evaluation of the flow.

        Args:
            img: (batch, image tokens, in_channels), in the computation dtype, as are `txt` and `pooled`.
            txt: (batch, text tokens, context).
            pooled: (batch, vector).
            time: (batch,), fp32, 1 for pure noise and 0 for the finished image.
            rotation: what `rotary_rotation` gives for text tokens followed by image tokens.
            guidance: (batch,), fp32; has no effect on a model without a guidance embedding.

        Returns:
            (batch, image tokens, out_channels).
        """
        dtype = img.dtype
        vector = self.time_in(sinusoids(time).to(dtype)) + self.vector_in(pooled)
        if self.guidance_in is not None:
            vector = vector + self.guidance_in(sinusoids(guidance).to(dtype))
        img, txt = self.img_in(img), self.txt_in(txt)
        for double in self.double_blocks:
            img, txt = double(img, txt, vector, rotation)
        x = torch.cat((txt, img), dim=1)
        for single in self.single_blocks:
            x = single(x, vector, rotation)
        return self.final_layer(x[:, txt.shape[1] :], vector)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def split_heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, tokens, 3 * hidden) -> query, key, value, each (batch, heads, tokens, head_dim)."""
    batch, tokens, _ = qkv.shape
    query, key, value = qkv.view(batch, tokens, 3, -1, head_dim).permute(2, 0, 3, 1, 4)
    return query, key, value


def attention(query: Tensor, key: Tensor, value: Tensor, rotation: Tensor) -> Tensor:
    """Rotates and attends: three times (batch, heads, tokens, head_dim) -> (batch, tokens, hidden)."""
    out = F.scaled_dot_product_attention(rotate(query, rotation), rotate(key, rotation), value)
    return out.transpose(1, 2).flatten(2)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns each pair of channels of x (batch, heads, tokens, head_dim) by its token's angle, in fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation
    return torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1).flatten(-2).to(x.dtype)


def rotary_rotation(head_dim: int, text_tokens: int, rows: int, columns: int) -> Tensor:
    """Cosines and sines of the three-axis rotary embedding, (2, tokens, head_dim / 2) in fp32.

    The axes are the index of the image (always 0 here), its row and its column; text tokens stand at the
    origin. An eighth of the channels belongs to the first axis and the rest half and half to the others (16,
    56 and 56 of Flux's 128). Computed on the CPU in fp64: the same numbers whatever the device.
    """
    first = head_dim // 8
    second = (head_dim - first) // 2
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    image = torch.stack((torch.zeros_like(row), row, column), dim=-1).view(-1, 3)
    positions = torch.cat((torch.zeros(text_tokens, 3, dtype=image.dtype), image)).double()
    angles = [
        positions[:, axis, None] * ROPE_THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        for axis, width in enumerate((first, second, head_dim - first - second))
    ]
    angle = torch.cat(angles, dim=-1)
    return torch.stack((angle.cos(), angle.sin())).float()


def sinusoids(value: Tensor) -> Tensor:
    """Embeds (batch,) numbers of about 0 to 1 (time) or more (guidance) as (batch, 256) cosines and sines."""
    half = TIME_EMBEDDING // 2
    index = torch.arange(half, dtype=torch.float32, device=value.device)
    angle = 1000.0 * value.float()[:, None] * torch.exp(index * (-math.log(10_000.0) / half))
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def read_shape(tensors: Mapping[str, Tensor], path: str) -> FluxShape:
    """Reads the dimensions off the tensors' shapes.

    Raises:
        GGUFError: the tensors are not a Flux-family transformer's; names what is missing.
    """
    needed = (
        "img_in.weight",
        "txt_in.weight",
        "vector_in.in_layer.weight",
        "time_in.in_layer.weight",
        "double_blocks.0.img_mlp.0.weight",
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "final_layer.linear.weight",
    )
    check_present(needed, tensors, path)
    blocks = {
        tuple(name.split(".")[:2])
        for name in tensors
        if name.startswith(("double_blocks.", "single_blocks."))
    }
    # The number of different indices: a gap in them shows as a missing tensor, however large the last one is.
    depth = Counter(kind for kind, _ in blocks)
    hidden, in_channels = matrix_shape("img_in.weight", tensors, path)
    head_dim = tensors["double_blocks.0.img_attn.norm.query_norm.scale"].numel()
    if not head_dim or head_dim % 32 or hidden % head_dim:
        raise GGUFError(
            f"{path}: double_blocks.0.img_attn.norm.query_norm.scale has {head_dim} channels: no head size "
            f"that a Flux transformer of width {hidden} can have"
        )
    return FluxShape(
        hidden=hidden,
        head_dim=head_dim,
        mlp=matrix_shape("double_blocks.0.img_mlp.0.weight", tensors, path)[0],
        double_blocks=depth["double_blocks"],
        single_blocks=depth["single_blocks"],
        in_channels=in_channels,
        out_channels=matrix_shape("final_layer.linear.weight", tensors, path)[0],
        context=matrix_shape("txt_in.weight", tensors, path)[1],
        vector=matrix_shape("vector_in.in_layer.weight", tensors, path)[1],
        guidance="guidance_in.in_layer.weight" in tensors,
    )


def build(tensors: Mapping[str, PackedTensor], path: str, *, dtype: torch.dtype) -> FluxTransformer:
    """A transformer whose parameters are the file's tensors: matrices packed, vectors unpacked.

    Args:
        tensors: an open GGUF file.
        path: what errors call the file.
        dtype: the computation dtype; it becomes the logical dtype of the packed weights.

    Raises:
        GGUFError: no Flux-family file, or a tensor of the wrong shape.
    """
    named = {name.removeprefix(CHECKPOINT_PREFIX): tensor for name, tensor in tensors.items()}
    with torch.device("meta"):
        model = FluxTransformer(read_shape(named, path)).requires_grad_(False)
    expected = model.state_dict()
    check_present(expected, named, path)
    for name, parameter in expected.items():
        if named[name].shape != parameter.shape:
            raise GGUFError(
                f"{path}: tensor {name} has shape {tuple(named[name].shape)}, a Flux transformer of this "
                f"width needs {tuple(parameter.shape)}"
            )
    for module_name, module in model.named_modules():
        for leaf in module._parameters:
            tensor = named[f"{module_name}.{leaf}"]
            packed = leaf == "weight" and isinstance(module, nn.Linear)
            value = tensor.with_dtype(dtype) if packed else tensor.dequantize(dtype)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    return model.eval()


def check_present(names: Iterable[str], tensors: Mapping[str, Tensor], path: str) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        shown = ", ".join(missing[:MISSING_SHOWN])
        more = f" and {len(missing) - MISSING_SHOWN} more" if len(missing) > MISSING_SHOWN else ""
        raise GGUFError(f"{path}: not a Flux-family transformer: it has no tensor {shown}{more}")


def matrix_shape(name: str, tensors: Mapping[str, Tensor], path: str) -> tuple[int, int]:
    shape = tensors[name].shape
    if len(shape) != 2:
        raise GGUFError(f"{path}: tensor {name} has {len(shape)} dimensions, a linear layer's weight has 2")
    return shape[0], shape[1]

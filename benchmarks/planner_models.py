"""Profiles of models for the planner: the layers of a forward in order, their bytes, their computing time.

Times are FLOPs over an effective rate; attention and norms are left out. Weights are read first, which is
what unpacking takes: it reads packed bytes and writes 16 bits for each weight. A layer that sees one token
computes in no time.
"""

from __future__ import annotations

import random

from lib_qswap.swap.planner import LayerCost

FLUX_HIDDEN = 3072
T5_HIDDEN, T5_INNER, T5_BLOCKS = 4096, 10240, 24
SDXL_CONTEXT, SDXL_CONTEXT_TOKENS, SDXL_EMBEDDING = 2048, 77, 1280

Q4_K, Q8_0, F16 = 4.5, 8.5, 16.0
"""Bits per weight."""

MEMORY_BYTES_PER_FLOP = 1 / 125
"""Of device memory, by the operations that a card does in the same time: 500 GB/s at 62 TFLOPS."""


class Profile:
    """Collects layers of one model on a device of `tflops`."""

    def __init__(self, tflops: float) -> None:
        self.layers: list[LayerCost] = []
        self._flops_per_s = tflops * 1e12
        self._memory_bytes_per_s = MEMORY_BYTES_PER_FLOP * self._flops_per_s

    def add(self, name: str, weights: int, tokens: int, bits: float) -> None:
        """A matrix or kernel of `weights` elements that is applied to `tokens` vectors."""
        seconds = 0.0 if tokens == 1 else 2 * weights * tokens / self._flops_per_s
        nbytes = round(weights * bits / 8)
        # An unpacked weight is used where it lies.
        read_s = None if bits == F16 else min(seconds, (nbytes + 2 * weights) / self._memory_bytes_per_s)
        self.layers.append(LayerCost(name, nbytes, seconds, read_s))


def flux(bits: float, tflops: float, pixels: int = 1024, text_tokens: int = 512) -> list[LayerCost]:
    """The Linears of FLUX.1: 19 double blocks, 38 single blocks; an image token is 16 x 16 pixels."""
    profile, image_tokens = Profile(tflops), (pixels // 16) ** 2
    d = FLUX_HIDDEN
    for block in range(19):
        streams = (("img", image_tokens), ("txt", text_tokens))
        for stream, _ in streams:
            profile.add(f"double.{block}.{stream}_mod", 6 * d * d, 1, bits)
        for stream, tokens in streams:
            profile.add(f"double.{block}.{stream}_qkv", 3 * d * d, tokens, bits)
        for stream, tokens in streams:
            profile.add(f"double.{block}.{stream}_proj", d * d, tokens, bits)
            profile.add(f"double.{block}.{stream}_mlp.0", 4 * d * d, tokens, bits)
            profile.add(f"double.{block}.{stream}_mlp.2", 4 * d * d, tokens, bits)
    tokens = image_tokens + text_tokens
    for block in range(38):
        profile.add(f"single.{block}.modulation", 3 * d * d, 1, bits)
        profile.add(f"single.{block}.linear1", 7 * d * d, tokens, bits)
        profile.add(f"single.{block}.linear2", 5 * d * d, tokens, bits)
    return profile.layers


def t5_encoder(bits: float, tflops: float, tokens: int = 512) -> list[LayerCost]:
    """The encoder of T5 XXL."""
    profile, d = Profile(tflops), T5_HIDDEN
    for block in range(T5_BLOCKS):
        for name in ("q", "k", "v", "o"):
            profile.add(f"{block}.{name}", d * d, tokens, bits)
        for name in ("wi_0", "wi_1", "wo"):
            profile.add(f"{block}.{name}", d * T5_INNER, tokens, bits)
    return profile.layers


def sdxl_unet(bits: float, tflops: float, pixels: int = 1024, batch: int = 2) -> list[LayerCost]:
    """The UNet of SDXL: Linears of `bits`, convolutions in fp16; `batch` 2: with and without the prompt."""
    profile = Profile(tflops)

    def tokens(level: int) -> int:
        return batch * (pixels // 8 >> level) ** 2

    def resnet(name: str, inputs: int, outputs: int, level: int) -> None:
        profile.add(f"{name}.conv1", 9 * inputs * outputs, tokens(level), F16)
        profile.add(f"{name}.time_emb", SDXL_EMBEDDING * outputs, 1, bits)
        profile.add(f"{name}.conv2", 9 * outputs * outputs, tokens(level), F16)
        if inputs != outputs:
            profile.add(f"{name}.shortcut", inputs * outputs, tokens(level), F16)

    def transformer(name: str, d: int, depth: int, level: int) -> None:
        here, context = tokens(level), batch * SDXL_CONTEXT_TOKENS
        profile.add(f"{name}.proj_in", d * d, here, bits)
        for block in range(depth):
            for part in ("attn1.q", "attn1.k", "attn1.v", "attn1.out", "attn2.q"):
                profile.add(f"{name}.{block}.{part}", d * d, here, bits)
            for part in ("attn2.k", "attn2.v"):
                profile.add(f"{name}.{block}.{part}", SDXL_CONTEXT * d, context, bits)
            profile.add(f"{name}.{block}.attn2.out", d * d, here, bits)
            profile.add(f"{name}.{block}.ff.0", 8 * d * d, here, bits)
            profile.add(f"{name}.{block}.ff.2", 4 * d * d, here, bits)
        profile.add(f"{name}.proj_out", d * d, here, bits)

    def conv(name: str, d: int, level: int) -> None:
        profile.add(name, 9 * d * d, tokens(level), F16)

    widths, depths = (320, 640, 1280), (0, 2, 10)
    width = widths[0]
    skips = [width]
    for level, (outputs, depth) in enumerate(zip(widths, depths, strict=True)):
        for i in range(2):
            resnet(f"down.{level}.{i}", width, outputs, level)
            width = outputs
            if depth:
                transformer(f"down.{level}.{i}.attn", width, depth, level)
            skips.append(width)
        if level < 2:
            conv(f"down.{level}.op", width, level + 1)
            skips.append(width)
    resnet("mid.0", width, width, 2)
    transformer("mid.attn", width, depths[2], 2)
    resnet("mid.1", width, width, 2)
    for level, (outputs, depth) in reversed(list(enumerate(zip(widths, depths, strict=True)))):
        for i in range(3):
            resnet(f"up.{level}.{i}", width + skips.pop(), outputs, level)
            width = outputs
            if depth:
                transformer(f"up.{level}.{i}.attn", width, depth, level)
        if level:
            conv(f"up.{level}.op", width, level - 1)
    return profile.layers


def equal(count: int = 60, megabytes: float = 30, milliseconds: float = 2) -> list[LayerCost]:
    """All layers alike."""
    return [LayerCost(str(i), round(megabytes * 1e6), milliseconds / 1e3) for i in range(count)]


def one_giant(count: int = 60, megabytes: float = 20, milliseconds: float = 2) -> list[LayerCost]:
    """One layer of fifteen times the others' bytes and five times their time, in the middle."""
    layers = equal(count, megabytes, milliseconds)
    layers.insert(count // 2, LayerCost("giant", round(15e6 * megabytes), 5 * milliseconds / 1e3))
    return layers


def tiny(count: int = 2000) -> list[LayerCost]:
    """Many layers of 50 to 900 KB, of times that have nothing to do with their sizes."""
    pick = random.Random(0)
    return [
        LayerCost(str(i), pick.randrange(50, 900) * 1000, pick.uniform(10e-6, 90e-6)) for i in range(count)
    ]

"""The denoising loop of the stand-alone host: Euler steps along the predicted flow, from noise to a latent.

There is no text encoder and no VAE: text and pooled text are random numbers, and the finished latent is
shown as its principal components. What is left is what swapping is about, the transformer.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lib_qswap.standalone.flux import FluxTransformer, rotary_rotation

PATCH = 2
PIXELS_PER_TOKEN = 8 * PATCH  # the VAE's factor times the patch
MOST_PIXELS = 16384
TEXT_TOKENS = 64
GUIDANCE = 3.5
PROMPT_SEED = 0


class Denoised(NamedTuple):
    latent: Tensor  # (channels, rows, columns), fp32, on the CPU
    step_seconds: tuple[float, ...]

    @property
    def sha256(self) -> str:
        """Of the latent's bytes: equal for two runs exactly when every bit of their results is."""
        return hashlib.sha256(self.latent.numpy().tobytes()).hexdigest()


def check_size(pixels: int) -> None:
    """Raises ValueError for an image size that has no whole number of tokens, or too many."""
    if pixels > MOST_PIXELS:
        raise ValueError(f"size must be {MOST_PIXELS} pixels or less, not {pixels}")
    if pixels < PIXELS_PER_TOKEN or pixels % PIXELS_PER_TOKEN:
        raise ValueError(f"size must be a multiple of {PIXELS_PER_TOKEN} pixels, not {pixels}")


def schedule(steps: int, tokens: int, *, shifted: bool) -> list[float]:
    """The `steps + 1` times from 1 (noise) to 0 (image).

    Shifted towards noise for larger images as dev was trained: the logarithm of the shift grows in a straight
    line from 0.5 at 256 tokens to 1.15 at 4096. Schnell takes even steps.
    """
    times = [1 - step / steps for step in range(steps + 1)]
    if not shifted:
        return times
    shift = math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def times_of_image(model: FluxTransformer, steps: int, pixels: int) -> list[float]:
    """`schedule` for a square image."""
    side = pixels // PIXELS_PER_TOKEN
    return schedule(steps, side * side, shifted=model.shape.guidance)


@torch.inference_mode()
def denoise(
    model: FluxTransformer,
    *,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
    pixels: int,
    seed: int,
    synchronize: Callable[[], None],
    on_step: Callable[[int], None] = lambda done: None,
) -> Denoised:
    """Runs the whole loop for one square image.

    Args:
        model: its linear layers may be packed and swapped, as long as each can be called.
        dtype: of the computation; the latent itself stays in fp32 between the steps.
        pixels: side of the image, a multiple of 16.
        seed: of the noise. It is drawn on the CPU and thus the same on every device, as is the conditioning,
            which is one and the same prompt for all seeds.
        synchronize: waits until the step's compute is done; called once per step, for its time.
        on_step: called after each step with the number of steps done; may raise to stop the run.

    Raises:
        ValueError: `steps` or `pixels` cannot be.
        FloatingPointError: the latent is not finite or is constant.
    """
    check_size(pixels)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    shape = model.shape
    side = pixels // PIXELS_PER_TOKEN
    prompt = torch.Generator().manual_seed(PROMPT_SEED)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=prompt)

    noise = torch.Generator().manual_seed(seed)
    latent = torch.randn((1, side * side, shape.out_channels), generator=noise).to(device)
    text = draw(1, TEXT_TOKENS, shape.context).to(device, dtype)
    pooled = draw(1, shape.vector).to(device, dtype)
    # Fill, Canny and Depth see image conditioning beside the latent.
    conditioning = draw(1, side * side, shape.in_channels - shape.out_channels).to(device, dtype)
    guidance = torch.full((1,), GUIDANCE, device=device)
    rotation = rotary_rotation(shape.head_dim, TEXT_TOKENS, side, side).to(device)

    times = times_of_image(model, steps, pixels)
    step_seconds = []
    for step in range(steps):
        start = time.perf_counter()
        seen = torch.cat((latent.to(dtype), conditioning), dim=-1)
        now = torch.full((1,), times[step], device=device)
        flow = model(seen, text, pooled, now, rotation, guidance)
        latent = latent + (times[step + 1] - times[step]) * flow.float()
        synchronize()
        step_seconds.append(time.perf_counter() - start)
        on_step(step + 1)

    finished = unpatch(latent[0].cpu(), side)
    if not finished.isfinite().all() or finished.std() == 0:
        raise FloatingPointError(
            "the finished latent is not finite, or the same everywhere: the weights are unusable"
        )
    return Denoised(finished, tuple(step_seconds))


def unpatch(tokens: Tensor, side: int) -> Tensor:
    """(side * side, channels * 2 * 2) -> (channels, 2 * side, 2 * side)."""
    patches = tokens.view(side, side, -1, PATCH, PATCH)
    return patches.permute(2, 0, 3, 1, 4).reshape(-1, side * PATCH, side * PATCH)


def preview(latent: Tensor, *, scale: int = 8) -> Tensor:
    """A latent (channels, rows, columns) as an RGB picture, uint8 (rows * scale, columns * scale, 3).

    The three directions in which the channels vary most become red, green and blue, two standard deviations
    to either side of the mean: there is something to see for any model's latent, without its VAE.
    """
    channels = latent.flatten(1)
    centred = channels - channels.mean(dim=1, keepdim=True)
    _, directions = torch.linalg.eigh(centred @ centred.T)
    colours = directions[:, -3:].T.flip(0) @ centred
    colours = colours / colours.std(dim=1, keepdim=True).clamp_min(1e-6)
    picture = ((colours / 4 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).view(-1, *latent.shape[1:])
    return picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0).contiguous()

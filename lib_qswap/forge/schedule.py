"""The time steps of a run, as Forge's samplers are about to give them to the network."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def times_of_run(params: Any, engine: Any) -> torch.Tensor | None:
    """What the network of `engine` is given as its time step in the run whose first step is about to begin,
    fp32 (steps,) on the CPU; None where it cannot be told: a sampler that is no k-diffusion one, that asks
    for more than one forward a step, or whose sigmas somebody else makes.

    params: Forge's `CFGDenoiserParams`.
    """
    sampler, processing = params.denoiser.sampler, params.denoiser.p
    if (
        not hasattr(sampler, "get_sigmas")
        or "sigmas" not in inspect.signature(sampler.func).parameters
        or getattr(processing, "sampler_noise_scheduler_override", None) is not None
        or sampler.config is None
        or sampler.config.options.get("second_order", False)
    ):
        return None
    steps, first = _steps_of(params)
    sigmas = sampler.get_sigmas(processing, steps)[first:-1].cpu()
    if not len(sigmas) or sigmas[0] != params.sigma.flatten()[0].cpu():
        return None
    return engine.forge_objects.unet.model.predictor.timestep(sigmas).float()


def _steps_of(params: Any) -> tuple[int, int]:
    """How many steps the sampler's schedule has, and with which of them, from 0, it begins: where an image is
    given, with one of the last."""
    from modules.sd_samplers_common import setup_img2img_steps

    processing = params.denoiser.p
    if getattr(processing, "is_hr_pass", False):
        wanted = getattr(processing, "hr_second_pass_steps", 0) or processing.steps
        steps, last = setup_img2img_steps(processing, wanted)
    elif hasattr(processing, "init_images"):
        steps, last = setup_img2img_steps(processing)
    else:
        return params.total_sampling_steps, 0
    return steps, steps - last - 1

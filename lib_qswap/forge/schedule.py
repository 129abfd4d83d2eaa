"""The time steps of a run, as Forge's samplers are about to give them to the network."""

from __future__ import annotations

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
        or getattr(processing, "sampler_noise_scheduler_override", None) is not None
        or sampler.config is None
        or sampler.config.options.get("second_order", False)
    ):
        return None
    now = params.sigma.flatten()[0].cpu()
    for steps in _numbers_of_sigmas(params):
        sigmas = sampler.get_sigmas(processing, steps)[:-1].cpu()
        if bool((sigmas == now).any()):
            return engine.forge_objects.unet.model.predictor.timestep(sigmas).float()
    return None


def _numbers_of_sigmas(params: Any) -> list[int]:
    """How many a sampler may have asked for, the likelier first: one for each step, or, where an image is
    given, those of a whole run, of which the last ones are taken."""
    from modules import sd_samplers_common

    processing = params.denoiser.p
    whole = [params.total_sampling_steps]
    if getattr(processing, "denoising_strength", None) is None:
        return whole
    second_pass = (getattr(processing, "hr_second_pass_steps", 0) or processing.steps,)
    steps = second_pass if getattr(processing, "is_hr_pass", False) else ()
    return [*whole, sd_samplers_common.setup_img2img_steps(processing, *steps)[0]]

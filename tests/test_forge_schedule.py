"""The time steps of a run are told as Forge's samplers will give them, or not at all."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lib_qswap.forge import managed
from lib_qswap.forge.schedule import times_of_run
from lib_qswap.swap.run import Run


@pytest.fixture(autouse=True)
def forge(monkeypatch):
    """How many steps Forge makes of an image that is given."""

    def setup_img2img_steps(processing, steps=None):
        wanted = steps or processing.steps
        return int(wanted / processing.denoising_strength), wanted - 1

    common = ModuleType("modules.sd_samplers_common")
    common.setup_img2img_steps = setup_img2img_steps
    package = ModuleType("modules")
    package.sd_samplers_common = common
    monkeypatch.setitem(sys.modules, "modules", package)
    monkeypatch.setitem(sys.modules, "modules.sd_samplers_common", common)


class Sampler:
    def __init__(self, **options):
        self.func = lambda model, x, sigmas=None: None
        self.config = SimpleNamespace(options=options)
        self.asked = []

    def get_sigmas(self, _processing, steps):
        self.asked.append(steps)
        return torch.linspace(1, 0, steps + 1) ** 2


def engine(multiplier=1.0):
    predictor = SimpleNamespace(timestep=lambda sigma: sigma.double() * multiplier)
    return SimpleNamespace(
        forge_objects=SimpleNamespace(unet=SimpleNamespace(model=SimpleNamespace(predictor=predictor)))
    )


def params(sampler, total, sigma, **processing):
    processing = SimpleNamespace(**{"steps": 10, "sampler_noise_scheduler_override": None, **processing})
    denoiser = SimpleNamespace(sampler=sampler, p=processing)
    return SimpleNamespace(
        denoiser=denoiser, sigma=torch.full((2,), sigma), total_sampling_steps=total, sampling_step=0
    )


def test_each_step_has_the_time_that_the_network_is_given():
    times = times_of_run(params(Sampler(), 10, 1.0), engine(multiplier=1000.0))
    assert times.dtype == torch.float32
    assert torch.equal(times, (torch.linspace(1, 0, 11)[:-1] ** 2).double().mul(1000).float())


@pytest.mark.parametrize(
    ("processing", "whole", "made"),
    [
        ({"init_images": [], "denoising_strength": 0.5}, 20, 10),
        ({"is_hr_pass": True, "denoising_strength": 0.5, "hr_second_pass_steps": 5}, 10, 5),
        ({"is_hr_pass": True, "denoising_strength": 0.5, "hr_second_pass_steps": 0}, 20, 10),
    ],
)
def test_where_an_image_is_given_they_are_the_last_ones_of_a_whole_run(processing, whole, made):
    sampler = Sampler()
    sigmas = torch.linspace(1, 0, whole + 1) ** 2
    # Every other one of these is one of a schedule of as many steps as are made, too.
    times = times_of_run(params(sampler, made, sigmas[whole - made].item(), **processing), engine())
    assert sampler.asked == [whole]
    assert torch.equal(times, sigmas[whole - made : -1])


def test_the_first_pass_of_a_hires_fix_has_times_of_its_own():
    sampler = Sampler()
    times = times_of_run(params(sampler, 10, 1.0, denoising_strength=0.5, is_hr_pass=False), engine())
    assert sampler.asked == [10]
    assert len(times) == 10


@pytest.mark.parametrize(
    "what", ["two forwards", "no sigmas", "own sigmas", "other sigmas", "no config", "no argument"]
)
def test_what_is_not_known_is_not_told(what):
    sampler = Sampler(second_order=what == "two forwards")
    asked = params(sampler, 10, 0.123 if what == "other sigmas" else 1.0)
    if what == "no sigmas":
        asked.denoiser.sampler = SimpleNamespace(config=sampler.config)
    elif what == "own sigmas":
        asked.denoiser.p.sampler_noise_scheduler_override = lambda steps: None
    elif what == "no argument":
        sampler.func = lambda model, x, sigma_min, sigma_max, n: None
    elif what == "no config":
        sampler.config = None
    assert times_of_run(asked, engine()) is None


@pytest.mark.parametrize("conditioning", [None, object()])
def test_they_are_asked_for_once_a_run_where_something_depends_on_them(monkeypatch, conditioning):
    model, run, asked = object(), Run(), []
    attachment = SimpleNamespace(run=run, idle=SimpleNamespace(conditioning=conditioning))
    monkeypatch.setattr(managed, "_attachments", {model: attachment})
    unet = SimpleNamespace(forge_objects=SimpleNamespace(unet=SimpleNamespace(model=model)))

    def times():
        asked.append(run.index)
        return torch.ones(4)

    for _ in range(2):
        for step in (1, 1, 2, 3, 4):  # Twice in the first one, as with conditions that are no batch.
            managed.note_progress(unet, step, 4, times)
            assert run.times is None if conditioning is None else torch.equal(run.times, torch.ones(4))
    assert asked == ([] if conditioning is None else [1, 1])

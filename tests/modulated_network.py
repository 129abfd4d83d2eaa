"""A small network some of whose layers depend on a time and a pooled text alone, and a host's steps of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import torch

from lib_qswap.swap.conditioning import Conditioning
from lib_qswap.swap.manager import attach

WIDTH, TOKENS = 256, 8
TIMES = (1.0, 0.75, 0.5, 0.25)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(WIDTH, 2 * WIDTH))
        self.up = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(vector)[:, None].chunk(2, dim=-1)
        return x + self.up(x * (1 + scale) + shift)


class Network(torch.nn.Module):
    """Blocks that are modulated by a time and a pooled text."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.time_in = torch.nn.Linear(WIDTH, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(blocks))
        self.calls = 0

    def forward(self, x, time, pooled, context=None, **more):
        vector = self.time_in(torch.cos(time[:, None] * torch.arange(WIDTH, device=time.device))) + pooled
        for block in self.blocks:
            x = block(x, vector)
        return x if context is None else x + context


OF_NETWORK = Conditioning(("time", "pooled"), ("x", "context"), r"(^|\.)(time_in|modulation\.1)$")


class Setup:
    """A network on a device, and what its steps are asked for."""

    def __init__(self, device: str, **options) -> None:
        torch.manual_seed(0)
        self.network = Network().requires_grad_(False)
        self.device = torch.device(device)
        self.options = {"location": "shared", "budget_bytes": 0, "conditioning": OF_NETWORK, **options}
        self.attachment = attach(self.network, device=device, **self.options)
        self.x = torch.randn(1, TOKENS, WIDTH).to(self.device)
        self.pooled = torch.randn(1, WIDTH).to(self.device)

    @torch.no_grad()
    def step(self, time: float, pooled: torch.Tensor | None = None, **more) -> torch.Tensor:
        pooled = self.pooled if pooled is None else pooled
        now = torch.full((len(pooled),), time, device=self.device)
        return self.network(self.x, now, pooled=pooled, **more).cpu()

    def image(self, times=TIMES, **more) -> list[torch.Tensor]:
        return [self.step(time, **more) for time in times]

    @property
    def uses(self) -> dict[str, int]:
        return {layer.name: layer.times.uses for layer in self.attachment.layers}

    def fetched(self, run) -> set[str]:
        """The layers that are used while `run` runs."""
        before = self.uses
        run()
        return {name for name, count in self.uses.items() if count > before[name]}


DEPENDENT = {"time_in", *(f"blocks.{i}.modulation.1" for i in range(4))}
INDEPENDENT = {f"blocks.{i}.up" for i in range(4)}


def makers(kind: type[Setup], device: str, **usual) -> Iterator[Callable[..., Setup]]:
    """For a fixture: makes any number of setups, with the `usual` options, and detaches them at the end."""
    made: list[Setup] = []

    def make(**options) -> Setup:
        made.append(kind(device, **{**usual, **options}))
        return made[-1]

    yield make
    for one in made:
        one.attachment.detach()
    made.clear()
    gc.collect()


def equal(ours, others) -> bool:
    return len(ours) == len(others) and all(map(torch.equal, ours, others))

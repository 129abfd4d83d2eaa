"""The devices that step_times.py measures on, each with what is particular to it: where the models come from,
how a link is set or measured, and which counters there are."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import step_models
import torch
from step_throttle import Throttle
from torch import nn

from lib_qswap.quant.gguf_file import open_gguf
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.standalone.flux import build
from lib_qswap.standalone.host import CONDITIONING, computation_dtype
from lib_qswap.standalone.measure import read_bytes_per_s
from lib_qswap.swap.device import device_of
from lib_qswap.swap.device_state import state_of
from lib_qswap.swap.execute import Scratch
from lib_qswap.swap.home import Location
from lib_qswap.swap.manager import Attachment, attach

LINK_PROBE_BYTES = 256 << 20
SIMULATED_BYTES = 8 << 30
FEW_TEXT_TOKENS = 16


class Card(NamedTuple):
    """A device that another one stands for.

    link_bytes_per_s: from page-locked memory.
    """

    memory_bytes: int
    link_bytes_per_s: float

    @property
    def label(self) -> str:
        return (
            f"stands for a card of {self.memory_bytes / 1e9:.3g} GB: memory capped, "
            f"link throttled to {self.link_bytes_per_s / 1e9:.3g} GB/s"
        )


class Rig:
    """What all devices have in common.

    Attributes:
        clock: "virtual" where times are computed, "real" where they are waited for.
        cases: by name, what makes a case: for the simulated device the time that the whole model's bytes
            take over the link as a share of its compute, else the side of the image in pixels.
        has_dense_model: whether there is the same model with ordinary weights.
        has_conditioning: whether its layers see one, of which some depend on nothing else.
    """

    clock = "real"
    cases: dict[str, float]
    has_dense_model = False
    has_conditioning = False

    def __init__(self, device: torch.device, file: Path) -> None:
        self.device = device_of(device)
        self.tensors = open_gguf(file)
        self.file = file

    # -------------------------------------------------------------------------------------------- models
    def qswap_model(self) -> nn.Module:
        raise NotImplementedError

    def peer_model(self) -> tuple[nn.Module, Any]:
        """A model on the CPU for other programs, and what has to be kept as long as it runs."""
        raise NotImplementedError

    def attach(self, model: nn.Module, location: Location, *, same_prompt: bool = False) -> Attachment:
        """With nothing resident yet. `same_prompt`: what depends on the conditioning alone is kept, as for
        another image; only where `has_conditioning`."""
        raise NotImplementedError

    def inputs(self, model: nn.Module) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------ measuring
    def case(self, value: float, compute_s: float | None) -> contextlib.AbstractContextManager[Any]:
        """Inside, the device is as the case says; without `compute_s` as fast as it can be."""
        raise NotImplementedError

    def link_bytes_per_s(self) -> float:
        raise NotImplementedError

    def limit_memory(self, nbytes: int | None) -> None:
        """Lets the device have no more than that; None: all that there is."""
        raise NotImplementedError

    def throttled(self, link_bytes_per_s: float) -> contextlib.AbstractContextManager[Any]:
        """Inside, copies to the device have no more than that."""
        raise NotImplementedError

    @contextlib.contextmanager
    def standing_for(self, card: Card | None) -> Iterator[None]:
        """Inside, the device has the memory and the link of `card`; None: its own."""
        if card is None:
            yield
            return
        self.limit_memory(card.memory_bytes)
        try:
            with self.throttled(card.link_bytes_per_s):
                yield
        finally:
            self.limit_memory(None)

    def page_locked_bytes(self) -> int | None:
        """Of this process, now; None: not known."""
        raise NotImplementedError

    def simulated_bytes(self) -> int:
        """How much of this process's RAM stands for device memory."""
        return 0

    @property
    def module(self) -> Any:
        return getattr(torch, self.device.device.type)

    def clean_up(self) -> None:
        """Gives back what the last measurement left in caches."""
        gc.collect()
        self.device.synchronize()
        self.device.empty_cache()

    def home_bytes_per_s(self, attachment: Attachment) -> float | None:
        """How fast the masters of a model can be read; None where it takes no time that counts: virtual time
        has no reading, and page-locked memory the device reads by itself."""
        return None if self.clock == "virtual" else read_bytes_per_s(attachment.layers)

    def environment(self) -> dict[str, Any]:
        return {"device": str(self.device.device), "clock": self.clock}


def make_rig(device: str, file: Path, sides: list[int], clock: str) -> Rig:
    """sides: of the images that a device that computes makes; clock: of the simulated device, "virtual" or
    "real"."""
    if device == "simgpu":
        return SimulatedRig(file, compute_s=1.0, virtual=clock == "virtual")
    return ComputingRig(torch.device(device), file, sides)


class ComputingRig(Rig):
    """A device that computes: a GPU, or the CPU."""

    has_dense_model = True
    has_conditioning = True

    def __init__(self, device: torch.device, file: Path, sides: list[int]) -> None:
        super().__init__(device, file)
        self.dtype = computation_dtype(device)
        self.cases = {f"{side} x {side}": float(side) for side in sides}
        self._side = sides[0]
        self._link: float | None = None

    def qswap_model(self) -> nn.Module:
        return build(self.tensors, str(self.file), dtype=self.dtype)

    def dense_model(self) -> nn.Module:
        """With ordinary weights, on the device."""
        model = build(self.tensors, str(self.file), dtype=self.dtype)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    value = parameter.detach().to(self.device.device)
                    if isinstance(value, PackedTensor):
                        value = value.dequantize()
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
        return model

    def peer_model(self) -> tuple[nn.Module, Any]:
        scratch = Scratch(self.device)
        return step_models.packed_flux(self.tensors, self.dtype, scratch), scratch

    def attach(self, model: nn.Module, location: Location, *, same_prompt: bool = False) -> Attachment:
        return attach(
            model,
            device=self.device.device,
            location=location,
            budget_bytes=0,
            compute_dtype=self.dtype,
            name="model",
            conditioning=CONDITIONING if same_prompt else None,
        )

    def inputs(self, model: nn.Module) -> tuple[torch.Tensor, ...]:
        # A CPU would take minutes for what a GPU does in seconds.
        text_tokens = FEW_TEXT_TOKENS if self.device.is_host else step_models.TEXT_TOKENS
        return step_models.flux_inputs(model, self._side, text_tokens, self.device.device, self.dtype)

    @contextlib.contextmanager
    def case(self, value: float, compute_s: float | None) -> Any:
        self._side = int(value)
        yield

    def link_bytes_per_s(self) -> float:
        """Measured once, and once more while it is throttled; from page-locked memory where the device has
        it."""
        if self._link is None:
            self._link = self._measured_link()
        return self._link

    def _measured_link(self) -> float:
        source = torch.ones(LINK_PROBE_BYTES, dtype=torch.uint8)
        if self.device.can_page_lock:
            source = source.pin_memory()
        target = torch.empty_like(source, device=self.device.device)
        taken = []
        for _ in range(5):
            self.device.synchronize()
            begun = time.perf_counter()
            target.copy_(source, non_blocking=True)
            self.device.synchronize()
            taken.append(time.perf_counter() - begun)
        return LINK_PROBE_BYTES / min(taken)

    @contextlib.contextmanager
    def throttled(self, link_bytes_per_s: float) -> Iterator[None]:
        own = self.link_bytes_per_s()
        with Throttle(self.device, own, link_bytes_per_s):
            self._link = self._measured_link()
            try:
                yield
            finally:
                self._link = own

    def limit_memory(self, nbytes: int | None) -> None:
        _, total = self.module.mem_get_info()
        self.module.set_per_process_memory_fraction(1.0 if nbytes is None else min(1.0, nbytes / total))

    def page_locked_bytes(self) -> int | None:
        if not hasattr(torch.cuda, "host_memory_stats") or self.device.device.type != "cuda":
            return None
        own = state_of(self.device).pin_budget.used_bytes  # Registered, not from torch's allocator.
        return own + torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)

    def clean_up(self) -> None:
        super().clean_up()
        empty = getattr(torch._C, "_host_emptyCache", None)
        if empty is not None and self.device.device.type == "cuda":
            empty()

    def environment(self) -> dict[str, Any]:
        found = super().environment() | {"name": self.device.device.type}
        if self.device.device.type in ("cuda", "xpu"):
            properties = self.module.get_device_properties(self.device.device)
            found |= {"name": properties.name, "memory_bytes": properties.total_memory}
        return found


class SimulatedRig(Rig):
    """The simulated accelerator; its layers keep it busy for set times, `compute_s` for a whole step."""

    # The first one's link is idle half of the time with nothing resident; the second one's as long as its
    # compute with a quarter resident; the third one's is the limit until three quarters are.
    cases: dict[str, float] = {"compute-bound": 0.5, "balanced": 4 / 3, "link-bound": 4.0}  # noqa: RUF012

    def __init__(self, file: Path, compute_s: float, virtual: bool) -> None:
        import simgpu

        super().__init__(torch.device("simgpu"), file)
        self.clock = "virtual" if virtual else "real"
        self._sim = simgpu
        weights = [self.tensors[f"{name}.weight"] for name in step_models.flux_work()]
        self._bytes = sum(weight.packed_nbytes for weight in weights)
        self._times = step_models.flux_times(compute_s, self._bytes / sum(map(torch.numel, weights)))
        self._largest_bytes = max(weight.numel() for weight in weights) * torch.bfloat16.itemsize
        # Launches run ahead of the device, as on a GPU. Pageable copies take twice as long.
        simgpu.config(
            total=SIMULATED_BYTES, async_compute=True, virtual_time=virtual, latency=20e-6, cache_counts=False
        )

    def _model(self, weight_of: Callable[..., torch.Tensor]) -> nn.Module:
        return step_models.BusyFlux(self.tensors, self._times, self._sim.busy, weight_of)

    def qswap_model(self) -> nn.Module:
        return self._model(lambda packed: packed)

    def peer_model(self) -> tuple[nn.Module, Any]:
        """With what unpacking would take on the device, which QSwap's budgets have in them."""
        scratch = torch.empty(self._largest_bytes, dtype=torch.uint8, device="simgpu")
        return self._model(lambda packed: packed.packed.clone()), scratch

    def attach(self, model: nn.Module, location: Location, *, same_prompt: bool = False) -> Attachment:
        options: dict[str, Any] = {"compute_dtype": torch.bfloat16, "name": "model"}
        attachment = attach(model, device="simgpu", location=location, budget_bytes=0, **options)
        step_models.lend_to_busy_layers(attachment)
        return attachment

    def inputs(self, model: nn.Module) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(step_models.READ_BYTES, dtype=torch.uint8, device="simgpu"),)

    @contextlib.contextmanager
    def case(self, value: float, compute_s: float | None) -> Any:
        link = 0.0 if compute_s is None else self._bytes / (value * compute_s)
        with self.throttled(link):
            yield

    def throttled(self, link_bytes_per_s: float) -> contextlib.AbstractContextManager[Any]:
        return self._sim.settings(h2d=link_bytes_per_s, d2h=link_bytes_per_s, pageable=link_bytes_per_s / 2)

    def link_bytes_per_s(self) -> float:
        return self._sim.config()["h2d"]

    def limit_memory(self, nbytes: int | None) -> None:
        self._sim.set_total(nbytes or SIMULATED_BYTES)

    def page_locked_bytes(self) -> int | None:
        stats = self._sim.stats()
        return stats["pinned_bytes"] + stats["registered_bytes"]

    def simulated_bytes(self) -> int:
        stats = self._sim.stats()
        return stats["device_allocated_bytes"] + stats["cached_bytes"]

    def environment(self) -> dict[str, Any]:
        return super().environment() | {"name": "simulated accelerator"}

    def hazards(self) -> dict[str, int]:
        """What went wrong in the order of copies and compute, whoever did it."""
        return {name: count for name, count in self._sim.hazards().items() if count}

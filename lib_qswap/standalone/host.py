"""The stand-alone host: one Flux-family file, attached to QSwap, that generates and answers the panel."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from lib_qswap.quant.gguf_file import GGUFFile, open_gguf
from lib_qswap.quant.unpack import Arithmetic
from lib_qswap.standalone.budget import Budget
from lib_qswap.standalone.denoise import Denoised, check_size, denoise, times_of_image
from lib_qswap.standalone.flux import FluxTransformer, build
from lib_qswap.standalone.measure import DownloadCounter, peak_rss_bytes
from lib_qswap.swap import ledger
from lib_qswap.swap.conditioning import FLUX_LAYERS, Conditioning
from lib_qswap.swap.device import device_of
from lib_qswap.swap.home import LOCATIONS, Location
from lib_qswap.swap.manager import Attachment, attach

MB = 1 << 20


def _least(named: dict[str, Any], count: int) -> dict[str, Any]:
    """One token of a picture, and one of a text."""
    picture, text = (named[name][:, :1].repeat(count, 1, 1) for name in ("img", "txt"))
    return {"img": picture, "txt": text, "rotation": named["rotation"][:, :2]}


CONDITIONING = Conditioning(
    ("time", "pooled", "guidance"), ("img", "txt", "rotation"), FLUX_LAYERS, least=_least
)
ARITHMETICS: tuple[Arithmetic, ...] = ("exact", "like Forge")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is made with; None for a budget or a ring means automatic. keeps_outputs: of the layers that
    depend on the conditioning alone, for another run."""

    location: Location = "auto"
    budget: Budget | None = None
    pin_budget_bytes: int | None = None
    ring_bytes: int | None = None
    arithmetic: Arithmetic = "exact"
    keeps_outputs: bool = True
    steps: int = 4
    pixels: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """What one generation did.

    Attributes:
        step_seconds: wall time of each step.
        compute_seconds, stall_seconds: over all steps, by the device's clock; what stalls leave of the steps
        is compute. homes: how many layers have their master in which home.
        budget_bytes: what was planned with, after a budget below the floor was raised to it.
        device_weight_bytes_peak: fixed, resident, ring and scratch together, the most seen after any step.
        h2d_bytes_per_step: mean over the steps; making layers resident is not part of it.
        d2h_bytes: weights that came down from the device when layers were moved or dropped.
    """

    output_sha256: str
    steps: int
    step_seconds: tuple[float, ...]
    compute_seconds: float
    stall_seconds: float
    location: Location
    homes: dict[str, int]
    budget_bytes: int
    device_weight_bytes_peak: int
    pinned_bytes: int
    h2d_bytes_per_step: int
    d2h_bytes: int
    peak_rss_bytes: int
    layers: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first accelerator there is, else the CPU.

    Raises:
        ValueError: there is no such device, or it does not work.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.xpu.is_available():
            return torch.device("xpu")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, AttributeError, ImportError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"device {name} cannot be used: {reason}") from None
    return device


def computation_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


class StandaloneHost:
    """Runs one model file; a `PanelHost`.

    Generations, and changes of settings between them, take turns on a lock; `snapshot` and `trace` wait for
    nobody.

    Raises:
        GGUFError, OSError: the file is no Flux-family GGUF, or cannot be read.
        ValueError: a setting that cannot be.
    """

    def __init__(self, path: Path, device: torch.device, settings: Settings) -> None:
        check_size(settings.pixels)
        self.path = path
        self.device = device
        self.settings = settings
        self._dtype = computation_dtype(device)
        self._lock = threading.Lock()
        self._downloads = DownloadCounter()
        self._file: GGUFFile
        self._model: FluxTransformer
        self._attachment: Attachment
        self._attach()

    def _attach(self) -> None:
        settings = self.settings
        self._file = open_gguf(self.path)
        self._model = build(self._file, str(self.path), dtype=self._dtype)
        self._attachment = attach(
            self._model,
            device=self.device,
            location=settings.location,
            budget_bytes=self._budget_bytes(),
            pin_budget_bytes=settings.pin_budget_bytes,
            ring_bytes=settings.ring_bytes,
            arithmetic=settings.arithmetic,
            compute_dtype=self._dtype,
            name=self.path.stem,
            conditioning=CONDITIONING if settings.keeps_outputs else None,
        )
        self._attachment.begin_uploads()  # Whoever opened the file still has to press the button.

    @property
    def packed_bytes(self) -> int:
        """Of all tensors in the file; what a budget in percent is a share of."""
        return sum(tensor.nbytes for tensor in self._file.tensors)

    def _budget_bytes(self) -> int | None:
        return None if self.settings.budget is None else self.settings.budget.of(self.packed_bytes)

    def generate(self, on_step: Callable[[int], None] = lambda done: None) -> tuple[Denoised, Summary]:
        """Makes one latent; `on_step` is called with the number of steps done, and may raise to stop.

        Raises:
            GGUFError: the file has changed since it was opened.
            FloatingPointError: the latent is not finite or is constant.
        """
        with self._lock:
            self._file.check_unchanged()
            settings, attachment = self.settings, self._attachment
            if not attachment.active:
                attachment.rebalance(self._budget_bytes())
            timeline = attachment.state.streamer.timeline
            peaks = [_weight_bytes()]
            times = []

            def after_step(done: int) -> None:
                timeline.collect()
                times.append(timeline.finished[-1])
                peaks.append(_weight_bytes())
                on_step(done)

            told = times_of_image(self._model, settings.steps, settings.pixels)
            attachment.run.begin(settings.steps, torch.tensor(told[:-1], dtype=torch.float32))
            try:
                denoised = denoise(
                    self._model,
                    device=self.device,
                    dtype=self._dtype,
                    steps=settings.steps,
                    pixels=settings.pixels,
                    seed=settings.seed,
                    synchronize=self._wait_for_compute,
                    on_step=after_step,
                )
            finally:
                attachment.run.end()
            picture = ledger.model_snapshot(attachment)
            stall = sum(step.stall_s for step in times)
            return denoised, Summary(
                output_sha256=denoised.sha256,
                steps=settings.steps,
                step_seconds=denoised.step_seconds,
                compute_seconds=sum(step.seconds for step in times) - stall,
                stall_seconds=stall,
                location=settings.location,
                homes=dict(Counter(layer["home"] for layer in picture["layers"])),
                budget_bytes=picture["bytes"]["budget"],
                device_weight_bytes_peak=max(peaks),
                pinned_bytes=picture["bytes"]["pinned"],
                h2d_bytes_per_step=sum(step.h2d_bytes for step in times) // len(times),
                d2h_bytes=self._downloads.nbytes,
                peak_rss_bytes=peak_rss_bytes(),
                layers=len(picture["layers"]),
            )

    def _wait_for_compute(self) -> None:
        """Not for the copy stream: it is fetching for the next step already."""
        device = device_of(self.device)
        stream = device.current_stream()
        if stream is None:
            device.synchronize()
        else:
            stream.synchronize()

    def unload(self) -> int:
        """Drops every device copy; returns the bytes that came down so far, which should be none."""
        with self._lock, self._downloads:
            self._attachment.unload()
        return self._downloads.nbytes

    def use(self, settings: Settings) -> None:
        """Takes over other settings, after a generation that may be running."""
        check_size(settings.pixels)
        with self._lock, self._downloads:
            before, self.settings = self.settings, settings
            placing = ("location", "pin_budget_bytes", "ring_bytes", "arithmetic", "keeps_outputs")
            if any(getattr(before, name) != getattr(settings, name) for name in placing):
                self._attachment.detach()
                # The old model's masters go before the new one's come.
                del self._attachment, self._model
                try:
                    self._attach()
                except BaseException:  # As it was: else nothing would work any more.
                    self.settings = before
                    self._attach()
                    raise
            elif before.budget != settings.budget:
                self._attachment.rebalance(self._budget_bytes())

    def close(self) -> None:
        """Detaches the model and lets its memory go; the host cannot be used afterwards."""
        with self._lock, self._downloads:
            self._attachment.detach()
            del self._attachment, self._model

    # ------------------------------------------------------------------------------ for the panel
    def snapshot(self) -> dict[str, Any]:
        return ledger.snapshot()

    def trace(self) -> list[dict[str, Any]]:
        return ledger.trace_events()

    def plan(self, what_if: dict[str, Any]) -> dict[str, Any]:
        """See `PanelHost.plan`; the budget includes ring and scratch."""
        budget_bytes = _whole_number("budget_bytes", what_if.get("budget_bytes"))
        with self._lock:
            plan = self._attachment.make_plan(budget_bytes)
        return {
            "resident": list(plan.resident),
            "ring_bytes": plan.ring_bytes,
            "step_s": plan.step_s,
            "bound_s": plan.bound_s,
        }

    def apply(self, settings: dict[str, Any]) -> dict[str, Any]:
        """See `PanelHost.apply`."""
        changes: dict[str, Any] = {}
        for name, value in settings.items():
            if name == "qswap_location":
                changes["location"] = _one_of(name, value, LOCATIONS)
            elif name == "qswap_arithmetic":
                changes["arithmetic"] = _one_of(name, value, ARITHMETICS)
            elif name == "qswap_keep_outputs":
                if not isinstance(value, bool):
                    raise ValueError(f"{name} must be true or false, not {value!r}")
                changes["keeps_outputs"] = value
            elif name == "qswap_gpu_budget_mb":
                megabytes = _whole_number(name, value)
                changes["budget"] = Budget(nbytes=megabytes * MB) if megabytes else None
            elif name in ("qswap_pin_budget_mb", "qswap_ring_mb"):
                megabytes = _whole_number(name, value)
                field = "pin_budget_bytes" if name == "qswap_pin_budget_mb" else "ring_bytes"
                changes[field] = megabytes * MB or None
            else:
                raise ValueError(f"the demo has no setting named {name!r}")
        self.use(replace(self.settings, **changes))
        return {"applied": settings, "messages": []}


def _weight_bytes() -> int:
    return cast(int, ledger.snapshot()["device_memory"]["weights"])


def _whole_number(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be a whole number and not negative, not {value!r}")
    return value


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """The choice that `value` is in upper or lower case: the page writes "GPU", the code "gpu"."""
    for choice in choices:
        if isinstance(value, str) and value.lower() == choice.lower():
            return choice
    raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")

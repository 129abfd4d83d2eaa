"""QSwap's options in Forge: how they look in the Settings tab, and what they are worth at this moment.

Nothing listens for changes. Options are read when they are used, so that a change made by the page, the API,
or one request's `override_settings` (which fires no `onchange`) counts alike, from the next generation on.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from . import notices

SECTION = ("qswap", "QSwap")
MEGABYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the Settings tab. Without `choices` and with a number as its default, it is a number between
    `minimum` and `maximum`."""

    default: bool | str | int | float
    label: str
    help: str
    choices: tuple[str, ...] = ()
    minimum: float = 0
    maximum: float = 0
    infotext: str | None = None
    """The key under which an image carries this setting; pasting that image then offers it as an override.
    Only for what changes the image."""

    def parse(self, value: Any) -> bool | str | int | float:
        """The value in the option's own type. Raises ValueError with the sentence that follows the option's
        name."""
        if isinstance(self.default, bool):
            if isinstance(value, bool):
                return value
            raise ValueError(f"must be true or false, not {value!r}")
        if self.choices:
            for choice in self.choices:
                if isinstance(value, str) and value.casefold() == choice.casefold():
                    return choice
            raise ValueError(f"must be one of {', '.join(self.choices)}, not {value!r}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"must be a number, not {value!r}")
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"must be between {self.minimum:g} and {self.maximum:g}, not {value:g}")
        return int(value) if isinstance(self.default, int) else float(value)


def _megabytes(label: str, help: str) -> Option:
    return Option(0, label, help, maximum=4 * 1024 * 1024)


OPTIONS: Mapping[str, Option] = {
    "qswap_enabled": Option(
        True,
        "Use QSwap",
        "off puts Forge's own memory management back at the next generation, which loads the model again",
    ),
    "qswap_location": Option(
        "Auto",
        "Swap location",
        "where weights that do not fit into the GPU wait: Shared is page-locked RAM and the fastest, CPU is "
        "ordinary RAM, Disk is the GGUF file itself; Auto takes Shared, then CPU, then Disk as far as each "
        "reaches; GPU is Auto without regard to the limit below; as many layers as fit stay on the GPU with "
        "each of them",
        choices=("Auto", "GPU", "Shared", "CPU", "Disk"),
    ),
    "qswap_gpu_budget_mb": _megabytes(
        "GPU memory for weights (MB)",
        "0 = the free GPU memory less what the image needs, measured before each pass; a number is a limit "
        "for all models together and leaves more to other programs; does not count for the location GPU",
    ),
    "qswap_pin_budget_mb": _megabytes(
        "Page-locked memory (MB)",
        "0 = automatic; page-locked RAM is fast, but the rest of the system cannot use it",
    ),
    "qswap_ring_mb": _megabytes(
        "Transfer buffer on the GPU (MB)",
        "0 = automatic; swapped layers pass through it, and it is part of the GPU memory for weights",
    ),
    "qswap_arithmetic": Option(
        "exact",
        "Arithmetic of quantized weights",
        "exact: as the GGUF reference computes them; like Forge: the same pixels as without QSwap",
        choices=("exact", "like Forge"),
        infotext="QSwap arithmetic",
    ),
    "qswap_compute_dtype": Option(
        "Auto",
        "Precision of the computation",
        "Auto: what Forge chose for the model, but fp16 instead of bf16 on NVIDIA GPUs before the RTX 30 "
        "series; a change loads the model again",
        choices=("Auto", "fp16", "bf16"),
        infotext="QSwap compute dtype",
    ),
    "qswap_unpack_kernel": Option(
        "Auto",
        "Unpacking of quantized weights",
        "Auto: Triton's kernels where it is installed and serves the GPU, else PyTorch's own operations",
        choices=("Auto", "Triton", "Torch"),
        infotext="QSwap unpacking",
    ),
    "qswap_keep_outputs": Option(
        True,
        "Keep what depends on the prompt and the time step alone",
        "outputs of modulation layers (Flux, SD 3) stay in RAM: another image of the same prompt and "
        "schedule does not fetch the weights of these layers, and one of a new prompt once; the pixels are "
        "the same",
    ),
    "qswap_panel_hz": Option(
        2.0, "Updates of the panel per second", "while the panel is open", minimum=0.1, maximum=10
    ),
    "qswap_log_level": Option(
        "info",
        "Messages in the console",
        "how much is said there; the panel shows the latest, whatever the level",
        choices=notices.LEVELS,
    ),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The options as the other parts use them: locations in lower case as `lib_qswap.attach` takes them,
    sizes in bytes, None for automatic."""

    enabled: bool
    location: Literal["auto", "gpu", "shared", "cpu", "disk"]
    gpu_budget_bytes: int | None
    pin_budget_bytes: int | None
    ring_bytes: int | None
    arithmetic: Literal["exact", "like Forge"]
    compute_dtype: Literal["Auto", "fp16", "bf16"]
    unpack_kernel: Literal["Auto", "Triton", "Torch"]
    keeps_outputs: bool
    panel_hz: float
    log_level: notices.Level


def register() -> None:
    """Adds the options to Forge's Settings tab (in the `on_ui_settings` callback)."""
    from modules import shared

    for key, option in OPTIONS.items():
        shared.opts.add_option(key, _option_info(option))


def current(overrides: Mapping[str, Any] | None = None) -> Settings:
    """The options now, `overrides` (a request's `override_settings`) on top. A value that makes no sense
    counts as the default and is named once."""
    return _settings({**stored(), **{k: v for k, v in (overrides or {}).items() if k in OPTIONS}})


_held: tuple[object, Settings, int] | None = None
"""The job that runs, its settings, and the thread that it runs on."""


def begin_generation(overrides: Mapping[str, Any]) -> Settings:
    """Fixes the settings for the generation that starts now; `in_effect` answers with them until it ends.
    `overrides` are its `override_settings`, which Forge puts into its options only after this moment."""
    global _held
    settings = current(overrides)
    _held = (_job(), settings, threading.get_ident())
    notices.to_console(settings.log_level)
    return settings


def in_effect() -> Settings:
    """The settings of the generation that runs, or the current ones between generations."""
    held = _held
    return held[1] if held is not None and held[0] == _job() else current()


def generation_running() -> bool:
    """Whether the job that `begin_generation` was last called in is still going on."""
    return _held is not None and _held[0] == _job()


def generation_thread() -> int | None:
    """The thread that it is going on in; None where no such job is known. (Interrogating, which the page does
    beside whatever runs, begins and ends a job of its own.)"""
    held = _held
    return held[2] if held is not None and held[0] == _job() else None


def apply(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sets and saves options: `{"qswap_location": "Shared"}` -> `{"applied": {...}, "messages": [...]}`. They
    count from the next generation on.

    Raises ValueError with one sentence when a name or a value is wrong, or when the web UI does not let the
    option be changed; nothing is set then.
    """
    parsed = {key: _parse(key, value) for key, value in changes.items()}
    from modules import shared

    before = {key: shared.opts.data.get(key, OPTIONS[key].default) for key in parsed}
    try:
        for key, value in parsed.items():
            shared.opts.set(key, value)
            if getattr(shared.opts, key) != value:
                raise ValueError(f"{key} cannot be changed: the web UI does not allow it")
        if parsed:
            shared.opts.save(shared.config_filename)
    except AssertionError as error:  # how Forge says that its settings are frozen
        shared.opts.data.update(before)
        raise ValueError(f"the settings cannot be changed: {error}") from None
    except ValueError:
        shared.opts.data.update(before)
        raise
    changed = any(before[key] != value for key, value in parsed.items())
    return {"applied": parsed, "messages": ["takes effect at the next generation"] if changed else []}


def _parse(key: str, value: Any) -> Any:
    if key not in OPTIONS:
        raise ValueError(f"{key} is not a setting of QSwap; there are {', '.join(OPTIONS)}")
    try:
        return OPTIONS[key].parse(value)
    except ValueError as error:
        raise ValueError(f"{key} {error}") from None


def stored() -> dict[str, Any]:
    """The options as Forge keeps them, unchecked; those that nobody has set yet are missing."""
    # `opts.data` and not `opts.<key>`: before the Settings tab is built, Forge knows only what its file
    # holds.
    from modules import shared

    return {key: shared.opts.data[key] for key in OPTIONS if key in shared.opts.data}


def _settings(stored: Mapping[str, Any]) -> Settings:
    values: dict[str, Any] = {}
    for key, option in OPTIONS.items():
        try:
            values[key] = _parse(key, stored[key]) if key in stored else option.default
        except ValueError as error:
            notices.notice(f"{error}; using {option.default}", "warning", once=True)
            values[key] = option.default
    return Settings(
        enabled=values["qswap_enabled"],
        location=values["qswap_location"].lower(),
        gpu_budget_bytes=values["qswap_gpu_budget_mb"] * MEGABYTE or None,
        pin_budget_bytes=values["qswap_pin_budget_mb"] * MEGABYTE or None,
        ring_bytes=values["qswap_ring_mb"] * MEGABYTE or None,
        arithmetic=values["qswap_arithmetic"],
        compute_dtype=values["qswap_compute_dtype"],
        unpack_kernel=values["qswap_unpack_kernel"],
        keeps_outputs=values["qswap_keep_outputs"],
        panel_hz=values["qswap_panel_hz"],
        log_level=values["qswap_log_level"],
    )


def _option_info(option: Option) -> Any:
    import gradio as gr
    from modules import shared

    component: Any
    arguments: dict[str, Any]
    if isinstance(option.default, bool):
        component, arguments = gr.Checkbox, {}
    elif option.choices:
        component, arguments = gr.Radio, {"choices": list(option.choices)}
    elif isinstance(option.default, float):
        step = {"minimum": option.minimum, "maximum": option.maximum, "step": option.minimum}
        component, arguments = gr.Slider, step
    else:
        limits = {"minimum": option.minimum, "maximum": option.maximum, "precision": 0}
        component, arguments = gr.Number, limits
    info = shared.OptionInfo(
        option.default, option.label, component, arguments, section=SECTION, infotext=option.infotext
    )
    return info.info(option.help)


def _job() -> object:
    """What tells one job of the web UI from the next; an object of its own while none runs. Not its name,
    which changes with every batch of it and every cell of a grid."""
    from modules import shared

    state = shared.state
    return getattr(state, "time_start", None) if getattr(state, "job", "") else object()

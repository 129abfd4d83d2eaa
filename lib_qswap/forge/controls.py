"""Forge's own memory controls while QSwap manages the memory.

Forge sets Swap Location, Swap Method and GPU Weights from its presets on every page load, and each time asks
for a global unload. QSwap has settings of its own, so those are no decisions of the user. Only a GPU Weights
slider that the user moved, or a value given through the API, is one: it is an upper limit for the weights
until a preset or a page load puts the slider elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from .notices import fails_soft
from .patches import Patch

MEGABYTE = 1024 * 1024
# What Forge's presets leave to the computation, and what its backend starts with.
DEFAULT_INFERENCE_BYTES = 1024 * MEGABYTE

_lock = threading.Lock()
_limit_bytes: int | None = None
_before_api: tuple[float, int | None] | None = None
"""The inference memory (MB) and the limit that the API's last value took the place of."""


def weight_limit_bytes() -> int | None:
    """The upper limit for weights on the device that the user set with Forge's GPU Weights; None where the
    user set none."""
    return _limit_bytes


def inference_minimum_bytes() -> int:
    """What has to stay free for the computation at least. The value behind a slider that only a preset moved
    is not taken for a wish for more."""
    from backend import memory_management

    asked = int(memory_management.minimum_inference_memory())
    return asked if _limit_bytes is not None else min(asked, DEFAULT_INFERENCE_BYTES)


def patches() -> list[Patch]:
    from modules_forge import main_entry

    return [Patch(main_entry, "refresh_memory_management_settings", _refresh)]


@fails_soft(None)
def watch_component(component: Any, **_kwargs: Any) -> None:
    """For `on_after_component`: finds the preset and the slider at the top of the page, to listen to them."""
    from gradio.context import Context

    if Context.root_block is None:
        return
    elem_id, label = getattr(component, "elem_id", None), getattr(component, "label", None)
    if elem_id == "forge_ui_preset":
        _listen(component.change, _forget_limit)
        _listen(Context.root_block.load, _forget_limit)
    elif (
        label == "GPU Weights (MB)" and elem_id is None
    ):  # the presets' defaults have that label too, and an id
        # Unlike `change`, `input` does not fire when a preset sets the slider.
        _listen(component.input, _note_slider, inputs=[component])


def _listen(
    event: Callable[..., Any], function: Callable[..., None], inputs: list[Any] | None = None
) -> None:
    event(function, inputs=inputs, outputs=None, queue=False, show_progress="hidden", api_name=False)


def _note_slider(weights_mb: float) -> None:
    global _limit_bytes
    with _lock:
        _limit_bytes = max(0, int(weights_mb * MEGABYTE))


def _note_api(inference_mb: float) -> None:
    """A value through the API limits the weights; putting the earlier one back, as Forge does after a
    request's `override_settings`, brings back the earlier limit, or none."""
    from modules import shared
    from modules_forge import main_entry

    global _limit_bytes, _before_api
    if _before_api is not None and _before_api[0] == inference_mb:
        with _lock:
            _limit_bytes, _before_api = _before_api[1], None
        return
    _before_api = (shared.opts.forge_inference_memory, _limit_bytes)
    _note_slider(main_entry.total_vram - inference_mb)


def _forget_limit() -> None:
    global _limit_bytes, _before_api
    with _lock:
        _limit_bytes = _before_api = None


def _refresh(
    original: Callable[..., None],
    async_loading: str | None = None,
    inference_memory: float | None = None,
    pin_shared_memory: str | None = None,
    model_memory: float | None = None,
) -> None:
    from modules import processing

    if model_memory is None and inference_memory is not None:  # only the API gives it this way round
        _note_api(inference_memory)
    before, unload_asked = _in_effect(), processing.need_global_unload
    original(
        async_loading=async_loading,
        inference_memory=inference_memory,
        pin_shared_memory=pin_shared_memory,
        model_memory=model_memory,
    )
    if _in_effect() == before:  # a page was loaded, nothing changed: what is loaded stays
        processing.need_global_unload = unload_asked


def _in_effect() -> tuple[object, ...]:
    from backend import memory_management, stream

    return (
        stream.stream_activated,
        memory_management.PIN_SHARED_MEMORY,
        memory_management.current_inference_memory,
    )

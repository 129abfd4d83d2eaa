"""Switching QSwap on and off inside a running Forge.

The state lives here and not in `scripts/`: Reload UI executes the scripts again as new modules, while this
package stays imported.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from lib_qswap.quant import kernels

from . import notices, settings
from .patches import Patch, PatchTable
from .probe import ProbeResult, probe

_lock = threading.RLock()
_probe: ProbeResult | None = None
_table: PatchTable | None = None
_starts = 0
_error: str | None = None
"""Why the last start failed."""
_suspended: tuple[weakref.ref, str] | None = None
"""The engine that was loaded when the scripts were unloaded, and Forge's mark that it is up to date."""
_computed_with: tuple[bool, str, str | None, str] | None = None
"""What the last generation's text conditionings, which Forge keeps, were computed with."""
_loaded_dtype: str | None = None
"""The computation dtype setting that the loaded models were loaded with."""


def start() -> None:
    """Called whenever Forge loads `scripts/qswap.py`: at its start and on every Reload UI. Looks at the web
    UI and, if it is one that QSwap knows and QSwap is enabled, replaces its memory management. Never raises:
    whatever goes wrong, Forge stays as it was and a notice says why."""
    global _probe, _table, _starts, _loaded_dtype, _error
    with _lock:
        _starts += 1
        _error = None
        try:
            if _table is None:
                _probe = probe()
                if not _probe.supported:
                    notices.notice(f"off: {_probe.reason}", "warning", once=True)
                    return
                _table = PatchTable(_all_patches())
            chosen = settings.current()
            _loaded_dtype = _loaded_dtype or chosen.compute_dtype
            if chosen.enabled:
                _table.apply()
                _resume_model()
        except Exception as error:
            _table = None
            _error = f"{type(error).__name__}: {error}"
            notices.notice(f"off, Forge stays as it is: {_error}", "error")


def stop() -> None:
    """Called when Forge unloads its scripts (Reload UI; the extension was switched off): puts every replaced
    attribute back. While a generation runs, a thread of its own waits for its end, so that the reload does
    not."""
    if not applied():
        return
    from modules.call_queue import queue_lock

    if queue_lock.acquire(blocking=False):
        try:
            _suspend()
        finally:
            queue_lock.release()
        return
    starts = _starts

    def wait_and_suspend() -> None:
        with queue_lock:
            if _starts == starts:
                _suspend()

    threading.Thread(target=wait_and_suspend, name="qswap-stop", daemon=True).start()


def begin_generation(processing: Any) -> settings.Settings:
    """Called at the start of each generation, before Forge loads its model and puts `override_settings` into
    its options: fixes the settings for the generation, and switches QSwap on or off if they say so. Returns
    them."""
    global _computed_with, _loaded_dtype
    first_of_job = not settings.generation_running()
    chosen = settings.begin_generation(getattr(processing, "override_settings", None) or {})
    kernels.choose(chosen.unpack_kernel)
    with _lock:
        if _table is None:
            return chosen
        # Images within one job (the cells of a grid, a detailer's passes) may hold on to the loaded model,
        # and so does the upscale button.
        if first_of_job:
            from . import leftovers

            leftovers.drop_last_error()
        if first_of_job and not getattr(processing, "txt2img_upscale", False):
            if chosen.enabled != applied():
                _switch(chosen.enabled)
            elif chosen.enabled and chosen.compute_dtype != _loaded_dtype:
                _drop_models()
            _loaded_dtype = chosen.compute_dtype
        computed_with = (applied(), chosen.arithmetic, _loaded_dtype, chosen.unpack_kernel)
        if _computed_with is not None and computed_with != _computed_with:
            _clear_prompt_caches(processing)
        _computed_with = computed_with
    return chosen


def _clear_prompt_caches(processing: Any) -> None:
    from modules import processing as of_forge

    processing.clear_prompt_cache()
    # Forge leaves those of the hires pass as they are.
    for holder in (processing, getattr(of_forge, "StableDiffusionProcessingTxt2Img", None)):
        for name in ("cached_hr_c", "cached_hr_uc"):
            if hasattr(holder, name):
                setattr(holder, name, [None, None, None])


def applied() -> bool:
    """Whether QSwap manages Forge's memory now."""
    return _table is not None and _table.applied


def status() -> dict[str, Any]:
    """For the panel: `{"family", "family_name", "supported", "reason", "error"}`; `error`: why the last start
    failed, None where it did not. Without a probe there is nothing else."""
    found = {} if _probe is None else _probe.as_dict()
    return {**{key: value for key, value in found.items() if key != "hooks"}, "error": _error}


def _all_patches() -> list[Patch]:
    from . import bnb, controls, forward, loading, lora, memory

    return [patch for part in (loading, forward, bnb, memory, lora, controls) for patch in part.patches()]


def _switch(on: bool) -> None:
    assert _table is not None
    _drop_models()
    if on:
        _table.apply()
        notices.notice("on: the model is loaded again", again=True)
        return
    wrapped = _table.restore()
    notices.notice("off: Forge manages the memory, the model is loaded again", again=True)
    for patch in wrapped:
        notices.notice(
            f"another extension has replaced {patch}; QSwap's part in it passes everything through", "debug"
        )


def _drop_models() -> str:
    """Unloads every model and makes Forge load from the file at the next occasion. Returns the mark that
    Forge had for the loaded one."""
    from backend import memory_management
    from modules import sd_models

    from . import managed

    memory_management.unload_all_models()
    managed.release_all()
    mark, sd_models.model_data.forge_hash = sd_models.model_data.forge_hash, ""
    return mark


def _suspend() -> None:
    global _suspended
    from modules import sd_models

    with _lock:
        if not applied():
            return
        assert _table is not None
        engine = sd_models.model_data.sd_model
        mark = _drop_models()
        _table.restore()
        if engine is not None and mark:
            _suspended = (weakref.ref(engine), mark)


def _resume_model() -> None:
    """After Reload UI the model that QSwap loaded before is as good as new: spares Forge from loading it
    again."""
    global _suspended
    from modules import sd_models

    if _suspended is not None:
        engine, mark = _suspended[0](), _suspended[1]
        if (
            engine is not None
            and engine is sd_models.model_data.sd_model
            and not sd_models.model_data.forge_hash
        ):
            sd_models.model_data.forge_hash = mark
    _suspended = None

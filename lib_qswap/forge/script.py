"""QSwap's place in the page: the accordion below the prompt, and the callbacks that Forge runs."""

from __future__ import annotations

from typing import Any

import gradio as gr
import torch
from modules import script_callbacks, scripts, shared

from . import controls, extension, grid, notices, settings


def register() -> None:
    """Called by `scripts/qswap.py` whenever Forge (re)loads its scripts."""
    notices.to_console(settings.current().log_level)
    script_callbacks.on_ui_settings(notices.fails_soft(None)(settings.register))
    script_callbacks.on_after_component(controls.watch_component)
    script_callbacks.on_before_ui(grid.add_axes)
    script_callbacks.on_app_started(_register_without_page)
    script_callbacks.on_app_started(_add_panel_routes)
    script_callbacks.on_model_loaded(_attach_engine)
    script_callbacks.on_cfg_denoiser(_note_progress)
    script_callbacks.on_script_unloaded(notices.fails_soft(None)(extension.stop))
    extension.start()


class QSwapScript(scripts.Script):
    """Always there, in txt2img and img2img; has no arguments of its own, so that API requests stay as they
    are."""

    def title(self) -> str:
        return "QSwap"

    def show(self, is_img2img: bool) -> object:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with gr.Accordion("QSwap memory", open=False, elem_id=self.elem_id("accordion")):
            gr.HTML(_panel_html(self.elem_id("panel")), elem_id=self.elem_id("mount"))
        return []

    @notices.fails_soft(None)
    def before_process(self, p: Any, *args: Any) -> None:
        extension.begin_generation(p)

    @notices.fails_soft(None)
    def process(self, p: Any, *args: Any) -> None:
        _note_in_infotext(p)

    @notices.fails_soft(None)
    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        _note_in_infotext(p)  # A bitsandbytes model that QSwap swaps has packed weights since it was loaded.


@notices.fails_soft("")
def _panel_html(element_id: str) -> str:
    from lib_qswap.panel.page import mount_html

    subpath = (getattr(shared.cmd_opts, "subpath", None) or "").strip("/")
    return mount_html(element_id, base=f"/{subpath}" if subpath else "", hz=settings.current().panel_hz)


@notices.fails_soft(None)
def _register_without_page(demo: Any, _app: Any) -> None:
    """With --nowebui nobody makes the Settings tab, and the API refuses options that are not in it."""
    if demo is None:
        settings.register()


@notices.fails_soft(None)
def _add_panel_routes(_demo: Any, app: Any) -> None:
    from lib_qswap.panel.routes import add_routes

    from .login import login_dependencies
    from .panel_host import ForgePanelHost

    dependencies = login_dependencies(app, api_auth=getattr(shared.cmd_opts, "api_auth", None))
    add_routes(app, ForgePanelHost(), dependencies=dependencies)


@notices.fails_soft(None)
def _attach_engine(engine: Any) -> None:
    if extension.applied():
        from . import managed

        managed.attach_engine(engine)


@notices.fails_soft(None)
def _note_progress(params: Any) -> None:
    if extension.applied():
        from . import managed

        engine, step, of = shared.sd_model, params.sampling_step + 1, params.total_sampling_steps
        managed.note_progress(engine, step, of, lambda: _times_of_run(params, engine))


def _times_of_run(params: Any, engine: Any) -> torch.Tensor | None:
    from .schedule import times_of_run

    try:
        return times_of_run(params, engine)
    except Exception as error:  # Of a sampler that is otherwise than Forge's: nothing is lost but time.
        notices.notice(f"the sampler's schedule is not known: {type(error).__name__}: {error}", "debug")
        return None


def _note_in_infotext(p: Any) -> None:
    for key in ("QSwap arithmetic", "QSwap compute dtype", "QSwap unpacking"):
        p.extra_generation_params.pop(key, None)  # The cells of a grid have one dictionary.
    if not extension.applied() or not _has_quantized_weights(p.sd_model):
        return
    chosen = settings.in_effect()
    if chosen.arithmetic == "exact":
        p.extra_generation_params["QSwap arithmetic"] = chosen.arithmetic
    if chosen.compute_dtype != "Auto":
        p.extra_generation_params["QSwap compute dtype"] = chosen.compute_dtype
    if chosen.unpack_kernel != "Auto":
        p.extra_generation_params["QSwap unpacking"] = chosen.unpack_kernel


def _has_quantized_weights(engine: Any) -> bool:
    """Whether the image depends on how quantized weights are unpacked. Tensors that a .gguf file holds in
    full precision do not count."""
    from lib_qswap.quant.packed import PackedTensor

    objects = getattr(engine, "forge_objects", None)
    patchers = [
        getattr(getattr(objects, name, None), "patcher", getattr(objects, name, None))
        for name in ("unet", "clip")
    ]
    return any(
        isinstance(weight, PackedTensor) and weight.format.dtype is None
        for patcher in patchers
        if patcher is not None
        for weight in patcher.model.parameters()
    )

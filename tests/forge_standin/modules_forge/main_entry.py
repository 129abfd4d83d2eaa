import gradio as gr
from backend import memory_management, stream
from gradio.context import Context
from modules import processing, script_callbacks, shared

total_vram = int(memory_management.total_vram)
ui_forge_inference_memory = None


def make_checkpoint_manager_ui():
    """The top of the page, in an open `gr.Blocks`."""
    global ui_forge_inference_memory
    preset_default = gr.Slider(label="GPU Weights (MB)", elem_id="setting_flux_GPU_MB")
    preset = gr.Radio(
        label="UI", choices=["sd", "xl", "flux", "all"], value="flux", elem_id="forge_ui_preset"
    )
    ui_forge_inference_memory = gr.Slider(
        label="GPU Weights (MB)", value=total_vram - 1024, maximum=total_vram
    )
    for component in (preset, preset_default, ui_forge_inference_memory):
        script_callbacks.run("after_component", component, elem_id=component.elem_id)
    ui_forge_inference_memory.change(
        ui_refresh_memory_management_settings, inputs=[ui_forge_inference_memory]
    )
    Context.root_block.load(ui_refresh_memory_management_settings, inputs=[ui_forge_inference_memory])


def ui_refresh_memory_management_settings(model_memory, async_loading="Queue", pin_shared_memory="CPU"):
    refresh_memory_management_settings(
        async_loading=async_loading, pin_shared_memory=pin_shared_memory, model_memory=model_memory
    )


def refresh_memory_management_settings(
    async_loading=None, inference_memory=None, pin_shared_memory=None, model_memory=None
):
    async_loading = async_loading or shared.opts.forge_async_loading
    pin_shared_memory = pin_shared_memory or shared.opts.forge_pin_shared_memory
    if inference_memory is None:
        inference_memory = (
            shared.opts.forge_inference_memory if model_memory is None else total_vram - model_memory
        )
    shared.opts.set("forge_async_loading", async_loading)
    shared.opts.set("forge_inference_memory", inference_memory)
    shared.opts.set("forge_pin_shared_memory", pin_shared_memory)
    stream.stream_activated = async_loading == "Async"
    memory_management.current_inference_memory = inference_memory * 1024 * 1024
    memory_management.PIN_SHARED_MEMORY = pin_shared_memory == "Shared"
    processing.need_global_unload = True

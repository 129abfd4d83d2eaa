from backend import memory_management
from modules import scripts, shared
from modules.sd_models import forge_model_reload

need_global_unload = False


class StableDiffusionProcessing:
    def __init__(self, override_settings=None, script_runner=None, during=None, txt2img_upscale=False):
        self.override_settings = dict(override_settings or {})
        self.scripts = script_runner or scripts.ScriptRunner()
        self.during = during  # a test's look at the middle of the generation
        self.txt2img_upscale = txt2img_upscale
        self.extra_generation_params = {}
        self.prompt_caches_cleared = 0
        self.sd_model = None

    def clear_prompt_cache(self):
        self.prompt_caches_cleared += 1


class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    cached_hr_c = cached_hr_uc = None


def set_config(values):
    from modules_forge import main_entry

    memory = {}
    for key, value in values.items():
        if value == shared.opts.data.get(key):
            continue
        if key in ("forge_inference_memory", "forge_async_loading", "forge_pin_shared_memory"):
            memory[key.removeprefix("forge_")] = value
        else:
            shared.opts.set(key, value, is_api=True, run_callbacks=False)
    if memory:
        main_entry.refresh_memory_management_settings(**memory)


def process_images(p):
    global need_global_unload
    p.scripts.before_process(p)
    stored = {key: shared.opts.data[key] for key in p.override_settings if key in shared.opts.data}
    try:
        set_config(p.override_settings)
        if not p.txt2img_upscale:
            p.sd_model, reloaded = forge_model_reload()
            if need_global_unload and not reloaded:
                memory_management.unload_all_models()
            need_global_unload = False
        p.scripts.process(p)
        if p.during is not None:
            p.during(p)
        p.scripts.postprocess_batch(p, [], batch_number=0)
    finally:
        set_config(stored)

from types import SimpleNamespace

from backend import memory_management, utils
from modules import script_callbacks


class SdModelData:
    def __init__(self):
        self.sd_model = None
        self.forge_loading_parameters = {"checkpoint_info": "model.gguf"}
        self.forge_hash = ""


model_data = SdModelData()
loads = 0  # how often a model was loaded from its file, for the tests


class Engine:
    def __init__(self, unet):
        self.forge_objects = SimpleNamespace(unet=unet, clip=None, vae=None)


def make_unet():
    """What the loader would make of the file; a test sets its own."""
    return


def forge_loader(sd, additional_state_dicts=None):
    try:
        return utils.load_torch_file(sd)
    except:  # noqa: E722 the host's
        raise ValueError("Failed to recognize model type!")  # noqa: B904


def forge_model_reload():
    global loads
    current = str(model_data.forge_loading_parameters)
    if model_data.forge_hash == current:
        return model_data.sd_model, False
    if model_data.sd_model:
        model_data.sd_model = None
        memory_management.unload_all_models()
    loads += 1
    model_data.sd_model = Engine(make_unet())
    script_callbacks.run("model_loaded", model_data.sd_model)
    model_data.forge_hash = current
    return model_data.sd_model, True

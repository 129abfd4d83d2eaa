from enum import Enum

import torch


class VRAMState(Enum):
    NO_VRAM = 1
    NORMAL_VRAM = 3
    HIGH_VRAM = 4


vram_state = VRAMState.NORMAL_VRAM
ALWAYS_VRAM_OFFLOAD = False
current_loaded_models = []
current_inference_memory = 1024 * 1024 * 1024
PIN_SHARED_MEMORY = False
total_vram = 8192
unloads = 0  # how often everything was unloaded, for the tests


def get_torch_device():
    return torch.device("cpu")


def get_free_memory(dev=None, torch_free_too=False):
    return (total_vram << 20, 0) if torch_free_too else total_vram << 20


def soft_empty_cache(force=False):
    pass


def minimum_inference_memory():
    return current_inference_memory


def module_size(module, exclude_device=None, include_device=None, return_split=False):
    size = sum(p.nelement() * p.element_size() for p in module.parameters())
    return (size, size, 0) if return_split else size


def build_module_profile(model, model_gpu_memory_when_using_cpu_swap):
    return list(model.modules()), [], []


def bake_gguf_model(model):
    model.gguf_baked = True
    return model


class LoadedModel:
    def __init__(self, model):
        self.model = model
        self.device = model.load_device

    def model_load(self, model_gpu_memory_when_using_cpu_swap=-1):
        return self.model.model

    def model_unload(self, avoid_model_moving=False):
        pass


def free_memory(memory_required, device, keep_loaded=[], free_all=False):  # noqa: B006 the signature is the host's
    if free_all:
        while current_loaded_models:
            current_loaded_models.pop().model_unload()


def load_models_gpu(models, memory_required=0, hard_memory_preservation=0):
    for model in models:
        loaded = LoadedModel(model)
        loaded.model_load()
        current_loaded_models.insert(0, loaded)


def unload_all_models():
    global unloads
    unloads += 1
    free_memory(1e30, get_torch_device(), free_all=True)


def get_computation_dtype(inference_device, parameters=0, supported_dtypes=()):
    return supported_dtypes[0] if supported_dtypes else torch.float32


def unet_inital_load_device(parameters, dtype):
    return torch.device("cpu")

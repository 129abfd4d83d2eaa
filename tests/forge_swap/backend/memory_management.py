"""What step_forge.py calls of Forge's memory manager; layers become resident in turn while they fit."""

from types import SimpleNamespace

import torch

CPUState, VRAMState = SimpleNamespace(GPU=0), SimpleNamespace(NORMAL_VRAM=0)
PIN_SHARED_MEMORY = False
current_inference_memory = 0
loaded = []


def get_free_memory(dev=None, torch_free_too=False):
    raise NotImplementedError("replaced for the simulated device")


get_total_memory = get_free_memory


def module_size(module):
    return sum(p.data.nbytes for p in module.parameters())


def bake_gguf_model(model):
    model.gguf_baked = True


def load_models_gpu(patchers):
    for patcher in patchers:
        room = get_free_memory(patcher.load_device) - current_inference_memory
        for module in patcher.model.modules():
            if hasattr(module, "parameters_manual_cast"):
                room -= module_size(module)
                if room >= 0:
                    module.to(patcher.load_device)
                elif PIN_SHARED_MEMORY:
                    module._apply(torch.Tensor.pin_memory)
        loaded.append(patcher.model)


def unload_all_models():
    while loaded:
        loaded.pop().to("cpu")

import torch


def merge_lora_to_weight(patches, weight, key="", computation_dtype=None):
    """Each patch is a number that is added."""
    for strength, number, *_rest in patches:
        weight = weight + strength * number
    return weight


class LoraLoader:
    """Merges, and lets layers add on the fly, as Forge's does; `backup`: what merged parameters were."""

    def __init__(self, model):
        self.model = model
        self.backup = {}
        self.online_backup = []
        self.loaded_hash = str([])

    def refresh(self, lora_patches, offload_device=None, force_refresh=False):
        hashes = str(list(lora_patches))
        if hashes == self.loaded_hash and not force_refresh:
            return
        for module in set(self.online_backup):
            del module.forge_online_loras
        for key, parameter in self.backup.items():
            self._set(key, parameter)
        self.backup, self.online_backup = {}, []
        for (*_identity, online_mode), patches in lora_patches.items():
            for key, current in patches.items():
                name, _, child = key.rpartition(".")
                module = self.model.get_submodule(name)
                if online_mode:
                    module.__dict__.setdefault("forge_online_loras", {})[child] = [*current]
                    self.online_backup.append(module)
                    continue
                weight = getattr(module, child)
                self.backup.setdefault(key, weight)
                merged = merge_lora_to_weight(current, weight.data)
                self._set(key, torch.nn.Parameter(merged, requires_grad=False))
        self.loaded_hash = hashes

    def _set(self, key, parameter):
        name, _, child = key.rpartition(".")
        setattr(self.model.get_submodule(name), child, parameter)

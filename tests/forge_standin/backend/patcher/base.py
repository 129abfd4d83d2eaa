from backend.patcher.lora import LoraLoader


class ModelPatcher:
    def __init__(self, model, load_device=None, offload_device=None):
        self.model = model
        self.load_device, self.offload_device = load_device, offload_device
        self.lora_patches = {}
        if not hasattr(model, "lora_loader"):
            model.lora_loader = LoraLoader(model)
        self.lora_loader = model.lora_loader

    def is_clone(self, other):
        return self.model is getattr(other, "model", None)

    def add_patches(self, *, filename, patches, strength_patch=1.0, strength_model=1.0, online_mode=False):
        names = {name for name, _ in self.model.named_parameters()}
        found = {key: patch for key, patch in patches.items() if key in names}
        self.lora_patches[filename, strength_patch, strength_model, online_mode] = {
            key: [[strength_patch, patch, strength_model, None, None]] for key, patch in found.items()
        }
        return set(found)

    def refresh_loras(self):
        self.lora_loader.refresh(lora_patches=self.lora_patches, offload_device=self.offload_device)

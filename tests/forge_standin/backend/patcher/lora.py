class LoraLoader:
    def __init__(self, model):
        self.model = model
        self.loaded_hash = str([])

    def refresh(self, lora_patches, offload_device=None, force_refresh=False):
        pass

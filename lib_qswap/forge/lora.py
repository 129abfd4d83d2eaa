"""LoRAs on models that QSwap manages.

On packed weights a LoRA is added on the fly, to the unpacked weight, whatever the quantization: Forge's other
way writes into the packed bytes, for three of its types. On plain weights Forge merges, as it does without
QSwap, and the merged tensor becomes the layer's master until Forge puts the first one back.
"""

from __future__ import annotations

from typing import Any

from . import managed
from .patches import Patch


def patches() -> list[Patch]:
    from backend.patcher.base import ModelPatcher

    return [
        Patch(ModelPatcher, "add_patches", _add_patches),
        Patch(ModelPatcher, "refresh_loras", _refresh_loras),
    ]


def _add_patches(original: Any, self: Any, *, online_mode: bool = False, **kwargs: Any) -> Any:
    return original(self, online_mode=online_mode or managed.has_packed_weights(self.model), **kwargs)


def _refresh_loras(original: Any, self: Any) -> None:
    if managed.has_packed_weights(self.model):
        # Those that came before the weights were packed were to be merged.
        self.lora_patches = {(*key[:3], True): patches for key, patches in self.lora_patches.items()}
    attachment = managed.attachment_of(self.model)
    if attachment is None or str(list(self.lora_patches.keys())) == self.lora_loader.loaded_hash:
        original(self)
        return
    with attachment.masters_bound():
        original(self)

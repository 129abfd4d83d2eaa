"""LoRAs on models that QSwap manages.

On packed weights a LoRA is added on the fly, to the unpacked weight, whatever the quantization: Forge's other
way writes into the packed bytes, for three of its types. On plain weights Forge merges, as it does without
QSwap, one after the other on the model's device, and the merged tensor becomes the layer's master until Forge
puts the first one back. Norms have plain weights in packed models too, and their forwards add nothing on the
fly.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lib_qswap.quant.packed import PackedTensor

from . import managed
from .patches import Patch


def patches() -> list[Patch]:
    from backend.patcher import lora
    from backend.patcher.base import ModelPatcher

    return [
        Patch(ModelPatcher, "add_patches", _add_patches),
        Patch(ModelPatcher, "refresh_loras", _refresh_loras),
        Patch(lora, "merge_lora_to_weight", _merge_lora_to_weight),
    ]


_merging = threading.local()
"""device: where the thread merges weights of the CPU."""


def _add_patches(
    original: Any, self: Any, *, patches: Mapping[Any, Any], online_mode: bool = False, **kwargs: Any
) -> Any:
    if online_mode or not managed.has_packed_weights(self.model):
        return original(self, patches=patches, online_mode=online_mode, **kwargs)
    found = set()
    for online, some in zip((True, False), _online_and_merged(self.model, patches), strict=True):
        if some:
            found |= original(self, patches=some, online_mode=online, **kwargs)
    return found


def _online_and_merged(
    model: torch.nn.Module, patches: Mapping[Any, Any]
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Patches by name of a parameter, or by a tuple that begins with it: those of modules that have packed
    weights, and the others."""
    packed = {
        name
        for name, module in model.named_modules()
        if any(isinstance(parameter, PackedTensor) for parameter in module._parameters.values())
    }
    online: dict[Any, Any] = {}
    merged: dict[Any, Any] = {}
    for key, patch in patches.items():
        name = key if isinstance(key, str) else key[0]
        (online if name.rpartition(".")[0] in packed else merged)[key] = patch
    return online, merged


def _refresh_loras(original: Any, self: Any) -> None:
    if managed.has_packed_weights(self.model):
        self.lora_patches = _sorted_anew(self.model, self.lora_patches)
    if _has_others_on_the_fly(self):
        self.lora_loader.loaded_hash = ""  # Forge looks at names and strengths alone.
    attachment = managed.attachment_of(self.model)
    if attachment is None or str(list(self.lora_patches.keys())) == self.lora_loader.loaded_hash:
        original(self)
        return
    with attachment.masters_bound(), _merging_on(attachment.device.device):
        original(self)


@contextlib.contextmanager
def _merging_on(device: torch.device) -> Iterator[None]:
    _merging.device = device
    try:
        yield
    finally:
        _merging.device = None


def _merge_lora_to_weight(
    original: Any, patches: Any, weight: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """All masters are on the CPU, which takes many times as long as the device; what that merges is the same
    whichever layers are resident."""
    device = getattr(_merging, "device", None)
    if device is not None and weight.device.type == "cpu":
        # Out of memory, or something that the device cannot do: what is wrong with the LoRA the CPU says too.
        with contextlib.suppress(Exception):
            return original(patches, weight.to(device), *args, **kwargs).to(weight.device)
    return original(patches, weight, *args, **kwargs)


def _sorted_anew(model: torch.nn.Module, lora_patches: dict[Any, Any]) -> dict[Any, Any]:
    """The same patches, where those that came before the weights were packed were all to be merged."""
    result: dict[Any, Any] = {}
    for (*identity, online_mode), patches in lora_patches.items():
        online, merged = (patches, {}) if online_mode else _online_and_merged(model, patches)
        for mode, some in ((True, online), (False, merged)):
            if some or (not patches and mode == online_mode):
                result.setdefault((*identity, mode), {}).update(some)
    return result


def _has_others_on_the_fly(patcher: Any) -> bool:
    """Whether layers add patches that are not this patcher's: of the same LoRA, loaded again for another
    strength of its text encoder's part. Those it has would be on the device for nothing, and those that the
    layers add on the CPU."""
    for (*_identity, online_mode), patches in patcher.lora_patches.items():
        for key, own in patches.items() if online_mode else ():
            name, _, parameter = key.rpartition(".")
            module = patcher.model.get_submodule(name)
            added = getattr(module, "forge_online_loras", {}).get(parameter, ())
            if not any(one is own[0] for one in added):
                return True
    return False

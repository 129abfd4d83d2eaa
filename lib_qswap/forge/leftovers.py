"""Device memory that generations have left behind.

What Forge makes for a generation refers to itself. Tensors in it (text conditionings; after an error all that
was being computed) stay on the device until Python looks for such cycles, which is seldom in a process of so
many objects. Ten megabytes an image are in no budget, and would be missing from all of them.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Sequence

import torch

from lib_qswap.swap import ledger
from lib_qswap.swap.manager import Attachment

from . import managed

LOOK_FROM_BYTES = 64 << 20
"""Python looks, which takes about 0.2 s, when so much more is on the device than when it last did."""

_known_bytes: dict[torch.device, int] = {}


def drop_last_error() -> None:
    """Lets go of what the last generation was computing when it failed: Forge keeps its error, and with it
    all that its functions had, until the next one has succeeded."""
    error = getattr(sys.modules.get("modules_forge.main_thread"), "last_exception", None)
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def collect(device: torch.device, free_bytes: int) -> bool:
    """Lets Python look for what nobody can reach any more, if it is worth it; returns whether it did.

    Args:
        free_bytes: of device memory, what torch keeps for later included.
    """
    ours = [model for model in ledger.attachments() if model.device.device == device]
    if not ours:
        return False  # Whatever device that is: nothing here has a budget on it.
    left = _unaccounted_bytes(ours, device, free_bytes)
    known = _known_bytes.get(device, left)
    if left < known + LOOK_FROM_BYTES:
        _known_bytes[device] = min(left, known)
        return False
    gc.collect()
    del _known_bytes[device]  # The next call says what is still there: somebody uses it.
    return True


def _unaccounted_bytes(ours: Sequence[Attachment], device: torch.device, free_bytes: int) -> int:
    """What is on the device beside the weights of the models that are loaded there."""
    from backend import memory_management as mm

    _, total = ours[0].device.memory_bytes()
    weights = ours[0].state.shared_bytes + sum(model.device_bytes() for model in ours)
    for loaded in mm.current_loaded_models:
        if managed.attachment_of(loaded.model.model) is None:
            weights += int(mm.module_size(loaded.model.model, include_device=device))
    return total - free_bytes - weights

"""Stable Diffusion 3's table of positions, of which an image needs a part: 0.9 GB in SD 3.5 medium.

Forge leaves it on the host where it swaps the model, and copies the image's part for every step. Here it
stays there always, and the part is copied once.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from lib_qswap.swap.manager import Attachment

_TABLE, _CROP = "pos_embed", "cropped_pos_embed"


def stays_on_host(module: torch.nn.Module, name: str) -> bool:
    """Whether the buffer `name` of `module` is such a table."""
    return name == _TABLE and hasattr(module, _CROP)


def copy_crop_once(attachment: Attachment) -> None:
    """Lets the networks of `attachment` take the image's part of their table from the device, where it is as
    long as they run."""
    for reference in attachment.roots:
        network = reference()
        if network is not None and stays_on_host(network, _TABLE):
            network.__dict__[_CROP] = _cropper(attachment, network)


def restore(attachment: Attachment) -> None:
    """Takes back what `copy_crop_once` did."""
    for reference in attachment.roots:
        network = reference()
        if network is not None:
            network.__dict__.pop(_CROP, None)


def _cropper(attachment: Attachment, network: torch.nn.Module) -> Any:
    model, owner = weakref.ref(network), weakref.ref(attachment)
    crop_of: Any = getattr(type(network), _CROP)

    def cropped(height_width: Any) -> torch.Tensor:
        network, attachment = model(), owner()
        assert network is not None
        if attachment is None or not attachment.is_running:
            found: torch.Tensor = crop_of(network, height_width)
            return found
        kept, size = attachment.kept, tuple(height_width)
        if size not in kept:
            kept.clear()
            kept[size] = crop_of(network, height_width).to(attachment.device.device)
        return kept[size]

    return cropped

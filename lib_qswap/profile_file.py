"""Profiles for `qswap plan`: what a model's layers take, from a file that is written by hand or saved from
the panel's address `/qswap/v1/residency`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lib_qswap.swap.step_model import LayerCost

WRITTEN = '{"link_bytes_per_s": ..., "layers": [{"name": ..., "bytes": ..., "compute_s": ...}, ...]}'
"""A layer may have `read_s`, too: see `LayerCost`."""

MOST = 1e18
"""Of bytes and of seconds: sums of larger numbers are none."""


def read_profile(path: Path) -> tuple[list[LayerCost], float]:
    """The layers in execution order, and the link's bytes per second.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no profile; the message names the field, not the file.
    """
    try:
        # Of bytes: PowerShell 5 writes UTF-16, which is found out then.
        profile = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if isinstance(profile, dict) and isinstance(profile.get("models"), list):
        profile = _of_snapshot(profile["models"])
    if not isinstance(profile, dict) or not isinstance(profile.get("layers"), list):
        raise ValueError(f"a profile is {WRITTEN}, or what /qswap/v1/residency answers")
    link_bytes_per_s = _number(profile.get("link_bytes_per_s"), "link_bytes_per_s")
    if link_bytes_per_s < 1:
        raise ValueError("link_bytes_per_s must be 1 or more")
    return [_layer(layer, index) for index, layer in enumerate(profile["layers"])], link_bytes_per_s


def _of_snapshot(models: list[Any]) -> dict[str, Any]:
    """The profile of the last model that has run, of a snapshot (ledger.py)."""
    managed = [model for model in models if isinstance(model, dict) and model.get("layers")]
    for model in reversed(managed):
        step, layers = model.get("step"), model["layers"]
        link_bytes_per_s = step.get("link_bytes_per_s") if isinstance(step, dict) else None
        layers = [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []
        times_us = [layer.get("compute_us") for layer in layers]
        if link_bytes_per_s and layers and None not in times_us:
            return {
                "link_bytes_per_s": link_bytes_per_s,
                "layers": [
                    {
                        "name": layer.get("name"),
                        "bytes": layer.get("bytes"),
                        "compute_s": _number(time_us, f"layers[{index}].compute_us") / 1e6,
                        "read_s": _seconds_read(layer, index),
                    }
                    for index, (layer, time_us) in enumerate(zip(layers, times_us, strict=True))
                ],
            }
    raise ValueError("no model in it has been measured yet: generate one image of 4 steps, and save it again")


def _layer(layer: Any, index: int) -> LayerCost:
    if not isinstance(layer, dict) or not isinstance(layer.get("name"), str):
        raise ValueError(f'layers[{index}] must be {{"name": ..., "bytes": ..., "compute_s": ...}}')
    nbytes = _number(layer.get("bytes"), f"layers[{index}].bytes")
    if nbytes != int(nbytes):
        raise ValueError(f"layers[{index}].bytes must be a whole number, not {nbytes!r}")
    compute_s = _number(layer.get("compute_s"), f"layers[{index}].compute_s")
    read_s = layer.get("read_s")
    if read_s is not None:
        read_s = _number(read_s, f"layers[{index}].read_s")
    return LayerCost(layer["name"], int(nbytes), compute_s, read_s)


def _seconds_read(layer: dict[str, Any], index: int) -> float | None:
    time_us = layer.get("read_us")
    return None if time_us is None else _number(time_us, f"layers[{index}].read_us") / 1e6


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MOST:
        raise ValueError(f"{field} must be a number from 0 to {MOST:g}, not {str(value)[:20]}")
    return value

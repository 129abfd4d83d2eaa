"""Axes for the X/Y/Z plot script, to compare swap locations and arithmetics in one grid."""

from __future__ import annotations

from typing import Any

from .notices import fails_soft
from .settings import OPTIONS

_AXES = {"[QSwap] Swap location": "qswap_location", "[QSwap] Arithmetic": "qswap_arithmetic"}


@fails_soft(None)
def add_axes() -> None:
    """For `on_before_ui`, when all scripts are loaded. Does nothing where the plot script is missing or has
    the axes already."""
    from modules import scripts

    for data in scripts.scripts_data:
        if data.script_class.__module__ != "xyz_grid.py":
            continue
        existing = {axis.label for axis in data.module.axis_options}
        for label, key in _AXES.items():
            if label not in existing:
                axis = data.module.AxisOption(
                    label, str, _override(key), choices=lambda key=key: list(OPTIONS[key].choices)
                )
                data.module.axis_options.append(axis)


def _override(key: str) -> Any:
    def apply(p: Any, value: str, _values: Any) -> None:
        # As the setting of this one image: the options themselves stay as they are.
        p.override_settings[key] = value

    return apply

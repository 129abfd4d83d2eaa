"""Layers that see one token cost a transfer and no compute: four ways to treat Flux's modulation layers.

    python benchmarks/one_token_layers.py [--json FILE]

They are 27 % of Flux's weights. For each share of the weights that is resident, the predicted step of: every
layer treated alike (residents spread over bytes); modulation layers resident first; the planner's own choice,
which knows only times and bytes; and, as the limit of keeping their outputs for a pass with the same prompt
and sigma, a model without them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import planner_models

from lib_qswap.swap.planner import LayerCost, make_plan, predict_step, spread

CASES = (
    ("Q4_K", 1024, 12, 8e9),
    ("Q4_K", 1024, 60, 6e9),
    ("Q4_K", 512, 60, 24e9),
    ("Q4_K", 512, 60, 12e9),
    ("Q8_0", 1024, 60, 12e9),
    ("Q8_0", 512, 100, 24e9),
)
"""Type, pixels of a side, TFLOPS, link in bytes/s."""
SHARES = (0.0, 0.25, 0.5)
RING_LAYERS = 4
"""The ring of the ways that choose none, in sizes of the largest layer."""


def is_modulation(layer: LayerCost) -> bool:
    return layer.name.endswith(("_mod", "modulation"))


def alike(layers: Sequence[LayerCost], resident_bytes: float) -> set[str]:
    """Residents of about so many bytes, spread over the bytes of all layers."""
    total = sum(layer.nbytes for layer in layers)
    chosen = spread([layer.nbytes for layer in layers], min(1.0, resident_bytes / total))
    return {layer.name for layer, taken in zip(layers, chosen, strict=True) if taken}


def modulation_first(layers: Sequence[LayerCost], resident_bytes: float) -> set[str]:
    """The modulation layers as far as they fit, the rest of the bytes spread over the others."""
    first = set()
    for layer in filter(is_modulation, layers):
        if layer.nbytes <= resident_bytes:
            first.add(layer.name)
            resident_bytes -= layer.nbytes
    return first | alike([layer for layer in layers if not is_modulation(layer)], resident_bytes)


def step_s(layers: Sequence[LayerCost], resident: Collection[str], link: float) -> float:
    ring = RING_LAYERS * max(layer.nbytes for layer in layers)
    return predict_step(layers, resident, ring_bytes=ring, link_bytes_per_s=link)


def measure(type_name: str, pixels: int, tflops: float, link: float, share: float) -> dict[str, Any]:
    layers = planner_models.flux(getattr(planner_models, type_name), tflops, pixels)
    others = [layer for layer in layers if not is_modulation(layer)]
    resident_bytes = share * sum(layer.nbytes for layer in layers)
    budget = round(resident_bytes) + RING_LAYERS * max(layer.nbytes for layer in layers)
    return {
        "type": type_name,
        "pixels": pixels,
        "tflops": tflops,
        "link_bytes_per_s": link,
        "resident_share": share,
        "compute_s": sum(layer.compute_s for layer in layers),
        "alike_s": step_s(layers, alike(layers, resident_bytes), link),
        "modulation_first_s": step_s(layers, modulation_first(layers, resident_bytes), link),
        "planner_s": make_plan(layers, budget_bytes=budget, link_bytes_per_s=link).step_s,
        "outputs_kept_s": make_plan(others, budget_bytes=budget, link_bytes_per_s=link).step_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [measure(*case, share) for case in CASES for share in SHARES]
    ways = ("alike", "modulation_first", "planner", "outputs_kept")
    columns = ("type", "pixels", "TFLOPS", "GB/s", "resident", "compute", *ways)
    print(" ".join(f"{column:>16}" for column in columns))
    for row in rows:
        link, share = f"{row['link_bytes_per_s'] / 1e9:.0f}", f"{row['resident_share']:.0%}"
        seconds = [f"{row[f'{way}_s']:.3f}" for way in ("compute", *ways)]
        cells = (row["type"], row["pixels"], row["tflops"], link, share, *seconds)
        print(" ".join(f"{cell:>16}" for cell in cells))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

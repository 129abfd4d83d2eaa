"""Draws what step_times.py measured: step time over the share of the model in the budget, one panel a case.

python benchmarks/step_plot.py [RESULT.json] [--svg FILE]
"""

from __future__ import annotations

import argparse
import html
import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, GAP, LEGEND = 250, 220, 44, 34, 48, 20
COLOURS = {
    "QSwap shared": "#0072b2",
    "QSwap cpu": "#e69f00",
    "QSwap disk": "#009e73",
    "diffusers block_level": "#cc79a7",
    "diffusers block_level stream": "#cc79a7",
    "diffusers leaf_level": "#d55e00",
    "diffusers leaf_level stream": "#d55e00",
    "accelerate cpu_offload": "#56b4e9",
    "mmgp": "#f0e442",
    "Forge Queue CPU": "#8b5a2b",
    "Forge Async CPU": "#5b3a8c",
    "Forge Queue Shared": "#8b5a2b",
    "Forge Async Shared": "#5b3a8c",
}
OTHER_COLOUR = "#777"
DASHES = {"QSwap cpu": "5 3", "QSwap disk": "2 3", "stream": "6 3", "Shared": "4 4"}
"""Lines that lie on each other can be told apart."""

Points = list[tuple[float, float]]


def curves(case: dict[str, Any]) -> dict[str, Points]:
    """(share of the model in the budget, seconds of a step) by system; "bound" is the least of QSwap's.
    Systems without a budget keep nothing resident: a line from 0 to 1."""
    found: dict[str, Points] = {}
    bounds: dict[float, float] = {}
    for row in case["rows"]:
        if "ratio" not in row:
            continue
        if "budget_share" in row:
            found.setdefault(row["system"], []).append((row["budget_share"], row["step_s"]))
            if "location" in row:
                share = row["budget_share"]
                bounds[share] = min(bounds.get(share, row["bound_s"]), row["bound_s"])
        else:
            found[row["system"]] = [(0.0, row["step_s"]), (1.0, row["step_s"])]
    return {"bound": sorted(bounds.items()), **found}


def ticks(low: float, high: float) -> list[float]:
    """Seconds to draw a line at, on a logarithmic scale."""
    octaves = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    wanted = [factor * 2.0**octave for octave in octaves for factor in (1, 1.5)]
    if len(wanted) > 10:
        wanted = wanted[::2]
    return [seconds for seconds in wanted if low <= seconds <= high]


def panel(case: dict[str, Any], left: float) -> list[str]:
    lines = curves(case)
    taken = [seconds for points in lines.values() for _, seconds in points]
    low, high = min(taken) / 1.15, max(taken) * 1.15
    bottom = TOP + PANEL_HEIGHT

    def at(share: float, seconds: float) -> str:
        height = PANEL_HEIGHT * math.log(seconds / low) / math.log(high / low)
        return f"{left + share * PANEL_WIDTH:.1f},{bottom - height:.1f}"

    title = f"{case['case']}: link of {case['link_bytes_per_s'] / 1e9:.2g} GB/s"
    parts = [f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{html.escape(title)}</text>']
    for seconds in ticks(low, high):
        x, y = at(0, seconds).split(",")
        parts.append(f'<path d="M{x} {y}h{PANEL_WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{seconds:.3g} s</text>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = at(share, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{share:.0%}</text>')
    for name, points in lines.items():
        path = " ".join(at(*point) for point in points)
        if name == "bound":
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="#000" stroke-width="5" opacity="0.25"/>'
            )
            continue
        parts.append(f'<polyline points="{path}" fill="none" {stroke(name)}/>')
        if name.startswith("QSwap"):
            dots = (at(*point).split(",") for point in points)
            parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{COLOURS[name]}"/>' for x, y in dots]
    return parts


def stroke(name: str) -> str:
    dashes = next((dash for part, dash in DASHES.items() if name.endswith(part)), None)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'stroke="{COLOURS.get(name, OTHER_COLOUR)}" stroke-width="2"{dashed}'


def draw(result: dict[str, Any]) -> str:
    """The whole picture as SVG; without what was measured with memory capped."""
    cases = [case for case in result["cases"] if case["limit_bytes"] is None]
    width = LEFT + len(cases) * (PANEL_WIDTH + GAP)
    names = list(dict.fromkeys(name for case in cases for name in curves(case)))
    legend_top = TOP + PANEL_HEIGHT + 40
    per_row = max(1, width // 220)
    height = legend_top + -(-len(names) // per_row) * LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for i, case in enumerate(cases):
        parts += panel(case, LEFT + i * (PANEL_WIDTH + GAP))
    for i, name in enumerate(names):
        x, y = LEFT + i % per_row * 220, legend_top + i // per_row * LEGEND
        line = 'stroke="#000" stroke-width="5" opacity="0.25"' if name == "bound" else stroke(name)
        parts.append(
            f'<path d="M{x} {y - 4}h26" {line}/><text x="{x + 32}" y="{y}">{html.escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("result", nargs="?", type=Path, default=RESULTS / "step_times.json")
    parser.add_argument("--svg", type=Path)
    arguments = parser.parse_args()
    path = arguments.svg or arguments.result.with_suffix(".svg")
    path.write_text(draw(json.loads(arguments.result.read_text())), encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()

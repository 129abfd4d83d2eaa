"""Writes the figures in benchmarks/results/ into README.md, between the marks that the table stands between.

python benchmarks/fill_readme.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_tables import cards, gigabytes, tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {"shared": "Shared", "cpu": "CPU", "disk": "Disk"}
Row = dict[str, Any]
START, END = "<!-- figures:start -->", "<!-- figures:end -->"


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def forge_side_by_side() -> list[str]:
    figures = result("forge_side_by_side")
    conditions = figures["conditions"][0]
    lines = [
        "In Forge itself, on a simulated accelerator that computes on the CPU (ratios count, not seconds),",
        "a Flux GGUF of full depth at Q4_K, 64 x 64 pixels. "
        + (
            "All images but those of *exact* are the same, pixel for pixel."
            if figures["same_images"]
            else "The images differ."
        ),
        f"QSwap's rows without *exact* are *like Forge*. {figures['note']}",
        "",
        "| way | step | first image | after a new prompt | device peak | page-locked |",
        "|---|---|---|---|---|---|",
    ]
    headings = {
        "whole": "**the model fits whole**",
        "swapped": f"**device of {conditions['total_mb']} MB, link of {conditions['link_mb_s']:.0f} MB/s**",
    }
    for part, heading in headings.items():
        lines.append(f"| {heading} | | | | | |")
        for row in figures[part]:
            lines.append(
                f"| {row['way']} | {row['step_s']:.2f} s | {row['first_image_s']:.1f} s | "
                f"{row['second_image_s']:.1f} s | "
                f"{gigabytes(row['device_peak_bytes'])} | {gigabytes(row['page_locked_bytes'])} |"
            )
    lines += [
        "",
        "What Forge page-locks with Shared are copies that it then does not use: a GGUF's weights lie",
        "elsewhere.",
    ]
    return lines


def host_memory() -> list[str]:
    figures = result("host_memory")
    payload = gigabytes(figures["shared"]["payload_bytes"])
    lines = [f"RAM that a GGUF of {payload} takes (anonymous memory):", ""]
    lines += ["| | opening | in its home |", "|---|---|---|"]
    for location, row in figures.items():
        share = row["placed_bytes"] / row["payload_bytes"]
        opening = gigabytes(row["opened_bytes"])
        lines.append(f"| {NAMES[location]} | {opening} | {share:.3f} x the payload |")
    return lines


def simulated_step() -> list[str]:
    figures = result("simulated_step")
    lines = [
        "A step of the demo model with part of it resident, on a simulated accelerator that computes on the",
        "CPU, and what max(compute, swapped bytes / bandwidth) amounts to with the compute of another step,",
        "which varies by some percent:",
        "",
        "| from | resident | step | bound | ratio | waiting for weights |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        lines.append(
            f"| {NAMES[row['location']]} | {row['resident_share']:.0%} | {row['step_s']:.2f} s | "
            f"{row['bound_s']:.2f} s | {row['ratio']:.2f} | {row['stall_s'] * 1e3:.0f} ms |"
        )
    return lines


def row_like(first: Row, case: Row) -> Row:
    """The row of a case with the same system and budget; what another program left out has none."""
    wanted = first["system"], first.get("budget_share")
    return next((row for row in case["rows"] if (row["system"], row.get("budget_share")) == wanted), {})


def step_cell(row: Row) -> str:
    if "step_s" not in row:
        return row.get("error", "")
    return f"{row['step_s']:.2f} s" + (f" ({row['ratio']:.3f})" if "ratio" in row else "")


STEP_CASES = {
    "compute-bound": "the link is idle half of the time with nothing resident",
    "balanced": "with a quarter resident, it takes as long as compute",
    "link-bound": "with nothing resident, it takes four times as long as compute",
}


def step_times() -> list[str]:
    figures = result("step_times")
    environment = figures["environment"]
    cases = {case["case"]: case for case in figures["cases"]}
    peers = " and ".join(
        f"{name} {environment[name]}" for name in ("diffusers", "accelerate") if name in environment
    )
    lines = [
        f"Steps of the demo model (Flux at full depth, {environment['quant']}) beside other programs that",
        "swap, on the simulated accelerator in virtual time: layers keep it busy for set times, in",
        "proportion to Flux's at 1024 x 1024; copies take what the link's bandwidth says; host time and",
        f"reading from RAM or SSD cost nothing. {peers} get the same packed",
        "weights. In brackets: how many times the least that is possible, max(compute, swapped bytes /",
        "bandwidth). A budget holds residents and the transfer buffer; RAM includes what is page-locked.",
        "",
        *(f"- {name}: {what}." for name, what in STEP_CASES.items()),
        "",
        "![step time over the budget](benchmarks/results/step_times.svg)",
        "",
        f"| | budget | {' | '.join(cases)} | device peak | page-locked | RAM |",
        "|---" * (len(cases) + 5) + "|",
    ]
    for first in cases["balanced"]["rows"]:
        location, share = first.get("location"), first.get("budget_share")
        if location != "shared" and share not in (None, 0.1, 0.25):
            continue
        name = f"QSwap, {NAMES[location]}" if location else first["system"].replace("_", " ")
        cells = [step_cell(row_like(first, case)) for case in cases.values()]
        cells += [
            gigabytes(first[key]) if key in first else ""
            for key in ("peak_device_bytes", "page_locked_bytes", "rss_bytes")
        ]
        budget = "" if share is None else f"{share:.0%}"
        lines.append(f"| {name} | {budget} | {' | '.join(cells)} |")
    for share in (0.1, 0.25, 0.5):
        cells = []
        for case in cases.values():
            row = next(row for row in case["rows"] if row.get("budget_share") == share and "least_s" in row)
            cells.append(f"{row['least_s']:.2f} s")
        lines.append(f"| *nothing can be below* | {share:.0%} | {' | '.join(cells)} | | | |")
    lines += [
        "",
        "Peak, page-locked bytes and RAM are those of the balanced case; in virtual time the peaks of the",
        "streams of diffusers, whose host runs ahead, are lower limits. The last rows are what no choice of",
        "residents can be below, and no buffer, within that budget: Flux's double blocks have more bytes for",
        "their compute than the single ones, and what of them is not on the device has to come while they",
        "compute.",
    ]
    if any(row["system"].startswith("Forge") for row in cases["balanced"]["rows"]):
        lines += [
            "",
            "Forge's rows are its own memory manager and layers with the budget as 'GPU Weights', of which",
            "it keeps up to 1/1.3 resident; in its form Q4_K takes a ninth more bytes, and its Shared",
            "page-locks no GGUF weight. The host of its Async runs ahead as well.",
        ]
    return lines


def one_token_layers() -> list[str]:
    rows = result("one_token_layers")["measured"]
    lines = [
        "What the outputs of the modulation layers save that are kept: a step of the same model on the same",
        "simulated accelerator, from Shared, where each computes its own; and where they are kept, of a",
        "first image of 12 steps, of another one of the same prompt and schedule, and of one of a new",
        "prompt, for which they are computed ahead. A first image's first steps are measured and compute",
        "their own; what is computed ahead is in the mean of its steps, and of a new prompt's. In brackets:",
        "where its time steps are not known, as of a sampler that is not k-diffusion's.",
        "",
        "| | budget | each its own | first image | same prompt | new prompt | travels in a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['budget_share']:.0%} | {row['first_image_s']:.2f} s "
            f"| {row['told_image_s']:.2f} s ({row['untold_image_s']:.2f} s) "
            f"| {row['second_image_s']:.2f} s | {row['new_prompt_s']:.2f} s "
            f"| {row['first_image_bytes'] / 1e6:.0f}, then {row['second_image_bytes'] / 1e6:.0f} MB |"
        )
    return lines


def planner() -> list[str]:
    figures = result("planner")["summary"]
    return [
        "Plans beside the best that a search of 180,000 changes finds, timed by a discrete-event simulator:",
        f"{figures['cases']} cases of Flux, SDXL, T5 and odd shapes, 6 to 24 GB/s, budgets of 10 to 75 %. "
        f"{figures['at_the_bound']} plans are",
        f"at the bound, the others at most {figures['worst_over_best']:.2%} slower than the best. Planning "
        f"takes at most {figures['planning_s']:.2f} s, with",
        f"{figures['largest_layers']:,} layers {figures['planning_largest_s']:.2f} s.",
    ]


COMPARED = ("Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
PEERS = ("gguf-py", "diffusers", "ComfyUI-GGUF")


def dequant_cpu() -> list[str]:
    measured = result("dequant_cpu")
    figures = measured["dequant"]
    rows = {(row["type"], row["threads"]): row["fastest_s"] for row in figures["rows"]}
    shape = " x ".join(map(str, figures["shape"]))
    lines = [
        f"Unpacking a weight of {shape} to fp16 on a CPU ({measured['cpu']}), in ms, one thread / two;",
        "in brackets how many times QSwap's time each takes. gguf-py and ggml's C write fp32, gguf-py in one",
        "thread.",
        "",
        f"| | QSwap | a copy of the result | {' | '.join(PEERS)} | ggml C |",
        "|---" * (len(PEERS) + 4) + "|",
    ]
    for name in COMPARED:
        pair = [rows[name, threads] for threads in (1, 2)]
        cells = [" / ".join(f"{seconds['qswap'] * 1e3:.0f}" for seconds in pair)]
        cells += [
            " / ".join(
                f"{seconds[way] * 1e3:.0f} ({seconds[way] / seconds['qswap']:.1f})" for seconds in pair
            )
            for way in ("copy", *PEERS, "ggml C")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    others = [
        rows[name, threads]["gguf-py"] / rows[name, threads]["qswap"]
        for name, threads in rows
        if threads == 1 and name not in COMPARED and "gguf-py" in rows[name, threads]
    ]
    lines += [
        "",
        f"The {len(others)} other types that gguf-py unpacks take it {min(others):.1f} to {max(others):.1f}",
        "times QSwap's time in one thread.",
    ]
    two = [rows[name, 1]["qswap"] / rows[name, 2]["qswap"] for name, threads in rows if threads == 2]
    lines += [
        "",
        f"Two threads are {min(two):.2f} to {max(two):.2f} times as fast as one, whatever the type.",
        measured["avx2"],
    ]
    return lines


def forge_gpu() -> list[str]:
    """Forge with its web API on a GPU; "small" rows have had other work take the device's memory."""
    figures = result("forge_gpu")
    environment, model = figures["environment"], figures["model"]
    free = gigabytes(figures["small_free_bytes"])
    link = f"{environment['link_bytes_per_s'] / 1e9:.0f} GB/s"
    blocks = f"{model['double_blocks']} double and {model['single_blocks']} single blocks at {model['quant']}"
    side = figures["pixels"]
    lines = [
        f"In Forge itself on an {environment['name']} (link of {link}), a Flux GGUF of {blocks}",
        f"({gigabytes(model['transformer_bytes'])}, random weights) with a {model['text_encoder']}, "
        f"{side} x {side} pixels, {figures['steps']} steps. Those *like Forge* are",
        "Forge's images, pixel for pixel; those of *exact* by Triton are the same from everywhere, and",
        "PyTorch's differ from them in last digits.",
        "",
        "| way | step | image | device peak | page-locked |",
        "|---|---|---|---|---|",
    ]
    heads = {"whole": "the model fits whole", "small": f"{free} of device memory left by other work"}
    for device, head in heads.items():
        lines.append(f"| **{head}** | | | | |")
        lines += [
            f"| {row['way']} | {row['step_s'] * 1e3:.0f} ms | {row['image_s']:.2f} s | "
            f"{gigabytes(row['device_peak_bytes'])} | "
            f"{gigabytes(row['page_locked_bytes']) or 'staging only'} |"
            for row in figures["rows"]
            if row["device"] == device
        ]
    return lines


def gpu(part: Callable[[dict[str, Any], dict[str, Any]], list[str]]) -> list[str]:
    """Lines that `part` makes of the results of each GPU."""
    lines: list[str] = []
    for path in sorted(RESULTS.glob("gpu_*.json")):
        if not path.stem.endswith("_steps"):
            steps = path.with_name(f"{path.stem}_steps.json")
            found = part(result(path.stem), result(steps.stem) if steps.exists() else {})
            lines += ([""] if lines and found else []) + found
    return lines


def filled(part: Callable[[], list[str]]) -> list[str]:
    """The lines of a part whose result is there."""
    return part() if (RESULTS / f"{part.__name__}.json").exists() else []


def folded(summary: str, lines: list[str]) -> list[str]:
    """Shown when somebody clicks on the summary."""
    if not lines:
        return []
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "", "</details>"]


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    parts = {
        "In Forge": [*map(filled, (forge_gpu, forge_side_by_side))],
        "On a GPU, without Forge": [
            gpu(cards),
            folded("Unpacking by type, steps by location and budget", gpu(tables)),
        ],
        "Beside other programs, on a simulated accelerator": [
            *map(filled, (step_times, one_token_layers, simulated_step))
        ],
        "Unpacking on a CPU": [filled(dequant_cpu)],
        "RAM, and plans": [*map(filled, (host_memory, planner))],
    }
    sections = []
    for heading, written in parts.items():
        if any(written):
            sections += [f"### {heading}", *("\n".join(lines) for lines in written if lines)]
    readme.write_text(f"{before}{START}\n" + "\n\n".join(sections) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

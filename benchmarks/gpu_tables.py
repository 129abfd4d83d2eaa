"""The results of gpu_suite.py as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu_targets import of_copy, of_same_size_copy

Row = Mapping[str, Any]


def gigabytes(nbytes: float | None) -> str:
    if nbytes is None:
        return ""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.0f} MB"


def tables(suite: Row, steps: Row) -> list[str]:
    """Lines; what a run that was cut off has not measured is not there. suite, steps: the two results."""
    parts = [_ceilings(suite), _unpacking(suite), _engine(suite), _errors(suite)]
    cases = [case for case in steps.get("cases", ()) if case["rows"]]
    parts += [_BOUND] if cases else []
    parts += [_steps(case) for case in cases]
    return [line for part in parts if part for line in (*part, "")][:-1]


def cards(suite: Row, steps: Row) -> list[str]:
    """The cards that the GPU stood for, a line each, beside the fastest of the other programs there; nothing
    for a run without any."""
    lines = []
    for case in steps.get("cases", ()):
        rows = [row for row in case["rows"] if "step_s" in row]
        shown = {row["location"]: f"{row['step_s']:.3f} s" for row in rows if _is_first_image(row)}
        others = [row for row in rows if "location" not in row]
        if case["stands_for"] is None or not shown:
            continue
        other = "not measured"
        if others:
            fastest = min(others, key=lambda row: row["step_s"])
            other = f"{fastest['step_s']:.3f} s ({fastest['system'].replace('_', ' ')})"
        own = " | ".join(shown.get(location, "") for location in ("shared", "cpu", "disk"))
        limit, link = case["limit_bytes"] / 1e9, case["link_bytes_per_s"] / 1e9
        lines.append(f"| {limit:.3g} GB, {link:.0f} GB/s | {case['compute_s']:.3f} s | {own} | {other} |")
    if not lines:
        return []
    gpu = suite.get("environment", {}).get("name", "unnamed GPU")
    size = gigabytes(steps["environment"]["model_bytes"])
    return [
        f"A model of Flux's sizes at {steps['environment']['quant']} ({size}) on an {gpu}",
        "that stands for smaller cards: its memory capped, its link throttled, its computation as fast as",
        "ever. A step of the first image of a prompt, the whole model on the device and with each location:",
        "",
        "| memory, link | whole | Shared | CPU | Disk | fastest other program |",
        "|---|---|---|---|---|---|",
        *lines,
    ]


def _is_first_image(row: Row) -> bool:
    return "location" in row and not row["system"].endswith("next image")


_BOUND = [
    "The bound of a step is max(compute, swapped bytes / bandwidth): compute as in the row *all resident*,",
    "the bandwidth that of the link or, where that is less, the rate at which RAM or file was read by",
    "itself; so bounds differ from row to row, and what is within 5 % of 1 is the run's noise.",
]


def _ceilings(suite: Row) -> list[str]:
    environment, found = suite.get("environment", {}), suite.get("ceilings", {})
    names = {
        "device_copy_bytes_per_s": "copies within the device",
        "link_page_locked_bytes_per_s": "from page-locked RAM",
        "link_pageable_bytes_per_s": "from pageable RAM",
        "link_back_page_locked_bytes_per_s": "back to page-locked RAM",
    }
    rates = [f"{what} {found[name] / 1e9:.1f} GB/s" for name, what in names.items() if name in found]
    if "matrix_operations_per_s" in found:
        rates.append(f"products of matrices {found['matrix_operations_per_s'] / 1e12:.0f} Top/s")
    if not rates:
        return []
    triton = f", Triton {environment['triton']}" if environment["triton"] else ""
    return [f"{environment['name']}, PyTorch {environment['torch']}{triton}: {'; '.join(rates)}."]


def _unpacking(suite: Row) -> list[str]:
    types = suite.get("unpack", {}).get("types", {})
    lines = [
        f"Unpacking to {suite['dtype']} at the sizes of Flux's layers, least and most over six shapes: share",
        "of the copy bandwidth, and of what a copy of as many bytes reaches, which is less for the smaller",
        "layers on a fast GPU; times faster than the chain of torch operations of other programs (empty: not",
        "measured); and for a layer that sees one token the share of the copy bandwidth at which the packed",
        "weight is multiplied.",
        "",
        "| | of copy bandwidth | of a copy of that size | times the chain | one token, of copy bandwidth |",
        "|---|---|---|---|---|",
    ]
    with_triton = {name for name, rows in types.items() if any("triton_of_copy" in row for row in rows)}
    for name, rows in types.items():
        rows = [row for row in rows if "error" not in row]
        of_best = _range(rows, of_copy, "{:.0%}")
        of_same = _range(rows, of_same_size_copy, "{:.0%}")
        chain = _range(rows, lambda row: row["triton_times_faster_than_chain"], "{:.1f}")
        product = _range(rows, lambda row: row["product"]["fused_of_copy"], "{:.0%}")
        by_torch = " (by PyTorch)" if with_triton and name not in with_triton else ""
        lines.append(f"| {name}{by_torch} | {of_best} | {of_same} | {chain} | {product} |")
    return lines if types else []


def _range(rows: Sequence[Row], figure: Callable[[Row], float], form: str) -> str:
    """Least and most of the rows that have the figure."""
    values = []
    for row in rows:
        try:
            values.append(figure(row))
        except KeyError:
            continue
    return f"{form.format(min(values))} to {form.format(max(values))}" if values else ""


def _engine(suite: Row) -> list[str]:
    engine, lock, host = suite.get("engine", {}), suite.get("page_lock", {}), suite.get("host", {})
    lines = []
    if "swapped_s" in host:
        plain, resident, swapped = (host[f"{kind}_s"] * 1e6 for kind in ("plain", "resident", "swapped"))
        together = ""
        if "together_s" in host:
            together = f", {host['together_s'] * 1e6:.1f} µs where several come in one copy"
        if "by_torch_swapped_s" in host:
            by_torch = (host[f"by_torch_{kind}_s"] * 1e6 for kind in ("swapped", "together"))
            together += " ({:.1f} and {:.1f} µs where torch issues the copies)".format(*by_torch)
        lines.append(
            f"The host issues a layer in {plain:.1f} µs where nothing swaps, {resident:.1f} µs resident, "
            f"{swapped:.1f} µs swapped{together}."
        )
    if "switching" in engine:
        row = engine["switching"]
        size, leaving_ms = gigabytes(row["resident_bytes"]), row["unload_s"] * 1e3
        lines += [
            f"A model of {size} leaves the device in {leaving_ms:.1f} ms; back, its first step takes",
            f"{row['first_step_s']:.2f} s, a later one {row['later_step_s']:.2f} s, and its bytes "
            f"{row['transfer_s']:.2f} s on the link.",
        ]
    if "peak_over_allowed" in engine.get("running_ahead", {}):
        row = engine["running_ahead"]
        lines.append(
            f"Steps that the host does not wait for, with {row['budget_share']:.0%} of the model as budget: "
            f"device peak {gigabytes(row['peak_device_bytes'])}, {row['peak_over_allowed']:.3f} x budget and "
            "activations."
        )
    lines += [_prompt(row) for row in engine.get("prompts", ())]
    if "register_bytes_per_s" in lock:
        lines.append(
            f"Page-locking memory where it is: {lock['register_bytes_per_s'] / 1e9:.1f} GB/s; by torch's "
            f"allocator: {lock['allocator_bytes_per_s'] / 1e9:.1f} GB/s."
        )
    return lines


def _prompt(row: Row) -> str:
    link = row["link_bytes_per_s"]
    throttled = "" if link is None else f"a link of {link / 1e9:.0f} GB/s and "
    return (
        f"With {throttled}{row['budget_share']:.0%} of the model as budget a step takes {row['own_s']:.3f} s "
        f"where it computes its own modulation, {row['same_prompt_s']:.3f} s for another image of it, "
        f"and {row['new_prompt_s']:.3f} s in the mean of {row['steps']} steps of a new prompt."
    )


def _errors(suite: Row) -> list[str]:
    """What was not measured, or not to the end, and what somebody who was there has to say (`notes`; a case
    of the steps has a `note` of its own)."""
    errors = suite.get("errors", {})
    lines = [f"Not measured to the end: {name} ({error})." for name, error in errors.items()]
    return lines + suite.get("notes", [])


def _steps(case: Row) -> list[str]:
    card = "" if case["stands_for"] is None else f"; {case['stands_for']}"
    lines = [
        f"Steps at {case['case']}{card} (link {case['link_bytes_per_s'] / 1e9:.1f} GB/s):",
        "",
        "| | budget | step | bound | times the bound | device peak | page-locked | RAM |",
        "|---" * 8 + "|",
    ]
    for row in case["rows"]:
        share = f"{row['budget_share']:.0%}" if "budget_share" in row else ""
        start = f"| {row['system'].replace('_', ' ')} | {share}"
        if "step_s" not in row:
            lines.append(f"{start} | {row['error']} | | | | | |")
            continue
        bound = f"{row['bound_s']:.3f} s | {row['ratio']:.3f}" if "ratio" in row else " | "
        nbytes = [row[key] for key in ("peak_device_bytes", "page_locked_bytes", "rss_bytes")]
        lines.append(f"{start} | {row['step_s']:.3f} s | {bound} | {' | '.join(map(gigabytes, nbytes))} |")
    dense = [row for row in case["rows"] if "packed_over_dense" in row]
    if "note" in case:
        lines += ["", case["note"]]
    if dense:
        row = dense[0]
        lines += ["", f"All resident takes {row['packed_over_dense']:.3f} times {row['system']}."]
    return lines

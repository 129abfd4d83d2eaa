"""Residency as text for a terminal: the panel's picture for who has no page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Up to this many layers have a line each; more are grouped over the blocks that repeat.
_LINES_PER_MODEL = 40

_PLACES = ("resident", "in use", "ready", "on its way", "shared", "cpu", "disk")
_STATE_WORDS = {"resident": "resident", "in_use": "in use", "ready": "ready", "fetching": "on its way"}

Layer = Mapping[str, Any]


def residency_table(snapshot: Mapping[str, Any]) -> str:
    """The layers of every model and where they are, one line each; hundreds are grouped over the blocks.

    A group has one kind and one format and counts where its layers are:

        double_blocks.0-18.img_attn.qkv  19 x Q4_K  288 MB  12 resident, 7 shared
    """
    return "\n\n".join(_model_table(model) for model in snapshot.get("models") or ())


def summary_lines(snapshot: Mapping[str, Any]) -> list[str]:
    """What the panel says at a glance: a line for the device, one or two for each model, and the warnings."""
    if snapshot.get("enabled") is False:
        return ["QSwap is off."]
    lines = []
    memory = snapshot.get("device_memory") or {}
    if memory.get("total"):
        lines.append(
            f"{printable(snapshot.get('device') or 'device')}: "
            f"{format_bytes(memory.get('weights'))} of weights, "
            f"{format_bytes(memory.get('other'))} of everything else, "
            f"{format_bytes(memory.get('free'))} free of {format_bytes(memory['total'])}"
        )
    for model in snapshot.get("models") or ():
        lines += _model_summary(model)
    lines += [
        f"{message.get('level')}: {printable(message.get('text', ''))}"
        for message in snapshot.get("messages") or ()
        if message.get("level") not in ("info", "debug")
    ]
    return lines


def format_bytes(count: float | None) -> str:
    """A number of bytes for people, in units of 1024: "812 B", "3.4 MB", "19 MB", "24.0 GB"; "-" for None."""
    if count is None:
        return "-"
    value, unit = float(count), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1024, larger
    whole = unit == "B" or abs(value) >= 99.95 or (unit != "GB" and abs(value) >= 9.95)
    return f"{value:.0f} {unit}" if whole else f"{value:.1f} {unit}"


def printable(text: object) -> str:
    """Text that cannot steer the terminal: names come from strangers' files and may hold escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _model_table(model: Mapping[str, Any]) -> str:
    layers: Sequence[Layer] = model.get("layers") or ()
    title = printable(model.get("name", "model"))
    if model.get("managed") is False:
        return f"{title}: left to the host, {printable(model.get('reason') or 'no reason given')}"
    if not layers:
        return f"{title}: {printable(model.get('reason') or 'no layers')}"
    groups = _groups(layers) if len(layers) > _LINES_PER_MODEL else [[layer] for layer in layers]
    rows = [
        (
            printable(_common_name([str(layer.get("name")) for layer in group])),
            f"{len(group)} x {printable(group[0].get('quant') or '?')}",
            format_bytes(_bytes(group)),
            _where(group),
        )
        for group in groups
    ]
    rows.append(("total", f"{len(layers)} layers", format_bytes(_bytes(layers)), _where(layers)))
    names, counts, sizes = (max(len(row[column]) for row in rows) for column in range(3))
    return "\n".join(
        [title, *(f"  {row[0]:<{names}}  {row[1]:<{counts}}  {row[2]:>{sizes}}  {row[3]}" for row in rows)]
    )


def _model_summary(model: Mapping[str, Any]) -> list[str]:
    name = printable(model.get("name", "model"))
    if model.get("managed") is False:
        return [f"{name}: left to the host, {printable(model.get('reason') or 'no reason given')}"]
    size, step = model.get("bytes") or {}, model.get("step") or {}
    layers: Sequence[Layer] = model.get("layers") or ()
    total = size.get("total") if size.get("total") is not None else _bytes(layers)
    lines = [
        f"{name}: {len(layers)} {'layer' if len(layers) == 1 else 'layers'}, "
        f"{format_bytes(size.get('resident'))} of {format_bytes(total)} resident, "
        f"{format_bytes(size.get('fixed'))} fixed, ring {format_bytes(size.get('ring'))}, "
        f"page-locked {format_bytes(size.get('pinned'))} of {format_bytes(size.get('pin_budget'))}"
    ]
    seconds = step.get("seconds")
    if seconds:
        stall = step.get("stall_s") or 0.0
        h2d = step.get("h2d_bytes")
        rate = f" at {format_bytes(h2d / seconds)}/s" if h2d else ""
        spared = size.get("spared_per_step")
        if spared:
            rate += f" ({format_bytes(spared)} spared: prompt and steps seen before)"
        lines.append(
            f"{name}: step {_format_seconds(seconds)} (bound {_format_seconds(step.get('bound_s'))}), "
            f"{format_bytes(h2d)} swapped{rate}, stall {_format_seconds(stall)} ({stall / seconds:.0%})"
        )
    return lines


def _groups(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers that differ only in the numbers of their blocks, in the order of each group's first layer."""
    groups: dict[tuple[Any, ...], list[Layer]] = {}
    for layer in layers:
        # A number at the end of a name is the layer's own ("img_mlp.0"), not a block's.
        *path, leaf = str(layer.get("name")).split(".")
        pattern = (*("#" if part.isdecimal() else part for part in path), leaf)
        groups.setdefault((pattern, layer.get("kind"), layer.get("quant")), []).append(layer)
    return list(groups.values())


def _common_name(names: Sequence[str]) -> str:
    """One name for a group of names that differ in numbers only: "double_blocks.0-18.img_attn.qkv"."""
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(_ranges(column) if len(set(column)) > 1 else column[0] for column in columns)


def _ranges(numbers: Iterable[str]) -> str:
    """ "0", "1", "2", "5" -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted({int(number) for number in numbers}):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def _where(layers: Sequence[Layer]) -> str:
    counts = dict.fromkeys(_PLACES, 0)
    for layer in layers:
        place = _STATE_WORDS.get(str(layer.get("state"))) or str(layer.get("home"))
        counts[place] = counts.get(place, 0) + 1
    return ", ".join(f"{number} {printable(place)}" for place, number in counts.items() if number)


def _bytes(layers: Iterable[Layer]) -> int:
    return sum(layer.get("bytes") or 0 for layer in layers)


def _format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return (
        f"{seconds:.2f} s" if seconds >= 0.9995 else f"{seconds * 1000:.{0 if seconds >= 0.00995 else 1}f} ms"
    )

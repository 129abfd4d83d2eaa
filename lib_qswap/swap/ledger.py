"""What is where: plain data for the page, the terminal and the API, at any moment and from any thread."""

from __future__ import annotations

import functools
import logging
import math
import re
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from lib_qswap.quant import kernels

if TYPE_CHECKING:
    from lib_qswap.swap.layer import Layer
    from lib_qswap.swap.manager import Attachment

SCHEMA = 1
log = logging.getLogger("qswap")

_lock = threading.RLock()  # Garbage collection may end a model, with a message, while it is held.
_attachments: dict[int, weakref.ref[Attachment]] = {}  # by serial; written and copied in one step each
_MOST_MESSAGES = 64
_messages: deque[dict[str, Any]] = deque(maxlen=_MOST_MESSAGES)
_AMOUNT = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?= [MG]B\b)")
"""Of memory: what else has digits is a name, or makes another sentence."""
CLOSE = 0.2
"""Of the larger one of two amounts, up to which a message says nothing new."""
_logged: dict[str, list[float]] = {}  # amounts by the sentence without them, of what is in _messages
_notes: dict[str, dict[str, Any]] = {}


def register(attachment: Attachment) -> None:
    _attachments[attachment.serial] = weakref.ref(attachment)


def unregister(attachment: Attachment) -> None:
    _attachments.pop(attachment.serial, None)


def message(text: str, level: str = "info", *, again: bool = False) -> None:
    """Tells the user something, once: in the log and in the page. The same sentence with other amounts of
    memory takes the place of the former one in the page, and is logged only where one of them differs by a
    fifth from what was logged. `again`: logged each time, an answer to what the user does."""
    words = _AMOUNT.sub("\0", text)
    amounts = [float(amount) for amount in _AMOUNT.findall(text)]
    with _lock:
        known = next((entry for entry in _messages if _AMOUNT.sub("\0", entry["text"]) == words), None)
        if known is not None:
            _messages.remove(known)
        _messages.append({"t": time.time(), "level": level, "text": text})
        logged = _logged.get(words) if known is not None else None
        if not again and logged is not None and all(map(_close, logged, amounts)):
            return
        if len(_logged) > 4 * _MOST_MESSAGES:
            _logged.clear()
        _logged[words] = amounts
    log.log(getattr(logging, level.upper()), "%s", text)


def _close(logged: float, amount: float) -> bool:
    return abs(amount - logged) <= CLOSE * max(logged, amount)


kernels.report_to(functools.partial(message, level="warning"))


def note_unmanaged(name: str, reason: str | None) -> None:
    """A model that is left to the host, and why; None: it is gone."""
    with _lock:
        if reason is None:
            _notes.pop(name, None)
        else:
            _notes[name] = {"name": name, "managed": False, "active": True, "reason": reason, "layers": []}


def forget_unmanaged() -> None:
    """No model is left to the host any more."""
    with _lock:
        _notes.clear()


def attachments() -> list[Attachment]:
    """All attachments of this process, oldest first."""
    found = (reference() for reference in list(_attachments.values()))
    return [attachment for attachment in found if attachment is not None]


def snapshot() -> dict[str, Any]:
    """The residency of every layer of every model; ARCHITECTURE.md has the shape. Cheap, and waits for
    nothing."""
    models = attachments()
    device = models[-1].device if models else None
    memory: dict[str, Any] = {}
    if device is not None:
        free, total = device.memory_bytes()
        weights = sum(model.device_bytes() for model in models if model.device is device)
        weights += sum({id(m.state): m.state.shared_bytes for m in models if m.device is device}.values())
        memory = {
            "total": total,
            "free": free,
            "weights": weights,
            "other": max(0, total - free - weights) if not device.is_host else 0,
        }
    with _lock:
        messages, notes = list(_messages), list(_notes.values())
    return {
        "schema": SCHEMA,
        "enabled": True,
        "device": str(device.device) if device is not None else None,
        "location": models[-1].location if models else None,
        "unpack_kernel": kernels.in_use(models[-1].device.device) if models else None,
        "models": [model_snapshot(model) for model in models] + notes,
        "device_memory": memory,
        "messages": messages,
    }


def model_snapshot(model: Attachment) -> dict[str, Any]:
    """One entry of the snapshot's `models`."""
    states = model.state.streamer.states() if model.active else {}
    swapped = model.swapped_bytes
    step = _step_snapshot(model, swapped)  # Reads what layers took in it.
    layers = []
    pinned = 0
    for index, layer in enumerate(model.layers):
        home, measured = layer.home, layer.times.measured
        pinned += layer.payload_bytes if home.page_locked else 0
        state = _resident_state(layer) or states.get(layer, "swapped")
        layers.append(
            {
                "i": index,
                "name": layer.name,
                "kind": layer.kind,
                "quant": layer.quant,
                "bytes": layer.payload_bytes,
                "params": layer.elements,
                "home": home.kind,
                "state": state,
                "uses": layer.times.uses,
                # A resident is waited for once, when it comes.
                "stall_us": 0 if state == "resident" else round(layer.times.stall_s * 1e6),
                "compute_us": _microseconds(measured.compute_s if measured else None),
                "read_us": _microseconds(measured.read_s if measured else None),
            }
        )
    return {
        "name": model.name,
        "managed": True,
        "active": model.active,
        "used_at": model.used_at,
        "bytes": {
            "total": model.payload_bytes + model.fixed_bytes,
            "fixed": model.fixed_bytes if model.active else 0,
            "budget": model.budget_bytes,
            "resident": model.resident_bytes,
            "ring": model.state.streamer.ring_bytes,
            "scratch": model.state.scratch.nbytes,
            "pinned": pinned,
            "pin_budget": model.state.pin_budget.limit_bytes,
            "swapped_per_step": swapped if model.active else 0,
            "spared_per_step": model.idle.spared_bytes,
            "kept_outputs": model.idle.kept.nbytes,
        },
        "step": step,
        "layers": layers,
    }


def _resident_state(layer: Layer) -> str | None:
    """What there is of a resident by now: its copy may be under way, or still to come. None: it is none."""
    if layer.resident is None:
        return None
    upload = layer.resident_ready
    if upload is None or upload.arrived:
        return "resident"
    return "fetching" if upload.begun else "swapped"


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e6, 1)


def _step_snapshot(model: Attachment, swapped_bytes: int) -> dict[str, Any]:
    roots = {id(reference()) for reference in model.roots}
    finished = [step for step in model.state.streamer.timeline.finished if step.root in roots]
    step: dict[str, Any] = {"index": model.run.index, "of": model.run.steps}
    if finished:
        last = finished[-1]
        compute = last.seconds - last.stall_s
        link = model.link_bytes_per_s()
        step |= {
            "seconds": last.seconds,
            "compute_s": compute,
            "stall_s": last.stall_s,
            "h2d_bytes": last.h2d_bytes,
            "link_bytes_per_s": link,
            "bound_s": max(compute, swapped_bytes / link),
        }
    return step


def trace_events() -> list[dict[str, Any]]:
    """The last finished steps as Chrome trace events (https://ui.perfetto.dev opens them); times in
    microseconds."""
    events: list[dict[str, Any]] = []
    for process, state in enumerate({id(model.state): model.state for model in attachments()}.values()):
        start = 0.0
        for step in state.streamer.timeline.finished:
            for name, begin, served, copy_begin, copy_end in step.spans():
                if served > begin:
                    events.append(
                        _event(f"wait for {name}", "stall", process, 1, start + begin, served - begin)
                    )
                events.append(_event(name, "use", process, 0, start + served, 0.0))
                if not math.isnan(copy_end):
                    events.append(
                        _event(name, "copy", process, 2, max(0.0, start + copy_begin), copy_end - copy_begin)
                    )
            events.append(_event("step", "step", process, 0, start, step.seconds))
            start += step.seconds
    return events


def _event(
    name: str, category: str, process: int, thread: int, start_s: float, length_s: float
) -> dict[str, Any]:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "pid": process,
        "tid": thread,
        "ts": start_s * 1e6,
        "dur": length_s * 1e6,
    }

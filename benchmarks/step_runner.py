"""Times one system after the other on a rig of step_rigs.py, each with the bytes that it takes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from step_peers import Peer
from step_rigs import Rig
from torch import Tensor, nn

from lib_qswap.standalone.measure import peak_device_bytes, reset_peak_device_bytes, rss_bytes
from lib_qswap.swap import planner, profile
from lib_qswap.swap.home import Location
from lib_qswap.swap.manager import Attachment

RING_LAYERS = 4
"""Of the largest size, with a budget of 0 %."""

WARM_UP_STEPS = 4
"""The first forward traces; it and the second are measured for the plan, which is made again in the third."""

Row = dict[str, Any]


class Runner:
    """Measures systems on one rig in one case.

    Attributes:
        compute_s: of a step with the whole model on the device; 0 before that was measured.
    """

    def __init__(self, rig: Rig, steps: int, compute_s: float = 0.0) -> None:
        self.rig = rig
        self.steps = steps
        self.compute_s = compute_s
        self.expected: Tensor | None = None

    def all_resident(self) -> Row:
        """The model as a whole on the device: what compute takes."""
        row = self._peer("all resident", lambda model, device: model.to(device) and None)
        self.compute_s = row.get("step_s", 0.0)
        return row | {"swapped_bytes_per_step": 0}

    def dense(self) -> Row:
        """The model with its weights unpacked beforehand, as a whole on the device."""
        before = self.baseline()
        row: Row = {"system": f"dense {str(self.rig.dtype).removeprefix('torch.')}"}
        model = None
        try:
            model = self.rig.dense_model()
            row |= self.times(model, before) | {"swapped_bytes_per_step": 0}
            # Layers with one token are multiplied without rounding the weight: other bits than here.
            row |= {"same_output": None, "packed_over_dense": self.compute_s / row["step_s"]}
        except torch.cuda.OutOfMemoryError as error:
            row |= failure(error)
        del model
        return row

    def peer(self, name: str, peer: Peer) -> Row:
        row = self._peer(name, peer)
        return row | self.bound(row, None)

    def _peer(self, name: str, peer: Peer) -> Row:
        before = self.baseline()
        model, kept = self.rig.peer_model()
        model_bytes = sum(parameter.nbytes for parameter in model.parameters())
        row: Row = {"system": name, "model_bytes": model_bytes}
        give_back = None
        try:
            give_back = peer(model, self.rig.device.device)
            row |= self.times(model, before) | {"swapped_bytes_per_step": model_bytes}
        except Exception as error:  # Another program's, and no reason to lose what the others show.
            row |= failure(error)
        if give_back is not None:
            give_back()
        del model, kept
        return row

    def qswap(self, location: Location, shares: tuple[float, ...], *, same_prompt: bool = False) -> list[Row]:
        """`same_prompt`: steps of another image of one prompt."""
        before = self.baseline()
        model = self.rig.qswap_model()
        attachment = self.rig.attach(model, location, same_prompt=same_prompt)
        rows = [self._budget(attachment, model, share, before) for share in shares]
        attachment.detach()
        return rows

    def _budget(self, attachment: Attachment, model: nn.Module, share: float, ram_before: int | None) -> Row:
        location = attachment.location
        name = f"QSwap {location}" + (", next image" if attachment.idle.conditioning is not None else "")
        row: Row = {"system": name, "location": location, "budget_share": share}
        try:
            attachment.rebalance(budget_bytes(attachment, share))
            row |= self.times(model, ram_before)
        except torch.cuda.OutOfMemoryError as error:
            return row | failure(error)
        timeline = attachment.state.streamer.timeline
        timeline.collect()
        row["resident_share"] = attachment.resident_bytes / attachment.payload_bytes
        row["swapped_bytes_per_step"] = timeline.finished[-1].h2d_bytes
        home_bytes_per_s = self.rig.home_bytes_per_s(attachment)
        return row | self.bound(row, home_bytes_per_s) | self._least(attachment, home_bytes_per_s)

    def _least(self, attachment: Attachment, home_bytes_per_s: float | None) -> Row:
        """What no residency within the budget can be below."""
        assert attachment.budget_bytes is not None
        budget_bytes = attachment.budget_bytes - attachment.fixed_bytes - attachment.scratch_bytes
        rate = min(self.rig.link_bytes_per_s(), home_bytes_per_s or math.inf)
        layers = profile.costs(attachment.running_layers)
        return {"least_s": planner.least_step(layers, budget_bytes=budget_bytes, link_bytes_per_s=rate)}

    def bound(self, row: Row, home_bytes_per_s: float | None) -> Row:
        """What a step with the row's swapped bytes takes at least; nothing for a row without a step."""
        if "step_s" not in row:
            return {}
        rate = min(self.rig.link_bytes_per_s(), home_bytes_per_s or math.inf)
        bound_s = max(self.compute_s, row["swapped_bytes_per_step"] / rate)
        return {"home_bytes_per_s": home_bytes_per_s, "bound_s": bound_s, "ratio": row["step_s"] / bound_s}

    def baseline(self) -> int | None:
        """Gives back what the last measurement left; returns the RAM of the process."""
        self.rig.clean_up()
        return self._ram_bytes()

    def _ram_bytes(self) -> int | None:
        resident = rss_bytes()
        return None if resident is None else resident - self.rig.simulated_bytes()

    @torch.no_grad()
    def times(self, model: nn.Module, ram_before: int | None) -> Row:
        """Steps of a model that is ready to run, and what they take; the output is compared with that of the
        first model timed."""
        device = self.rig.device
        inputs = self.rig.inputs(model)
        for _ in range(WARM_UP_STEPS):
            model(*inputs)
            device.synchronize()
        reset_peak_device_bytes(device.device)
        stream, marks = device.current_stream(), []
        retries = device.allocation_retries()
        for step in range(self.steps + 2):
            if step:  # One more that begins with the device idle, and does not count.
                marks.append(device.new_event(timing=True))
                marks[-1].record(stream)
            output = model(*inputs)
        marks.append(device.new_event(timing=True))
        marks[-1].record(stream)
        device.synchronize()
        page_locked, ram = self.rig.page_locked_bytes(), self._ram_bytes()
        result = output.cpu()
        if self.expected is None:
            self.expected = result
        return {
            "step_s": marks[0].elapsed_time(marks[-1]) * 1e-3 / (len(marks) - 1),
            "step_seconds": [one.elapsed_time(then) * 1e-3 for one, then in itertools.pairwise(marks)],
            "peak_device_bytes": peak_device_bytes(device.device),
            "allocation_retries": device.allocation_retries() - retries,
            "page_locked_bytes": page_locked,
            "rss_bytes": None if ram is None or ram_before is None else ram - ram_before,
            "same_output": torch.equal(result, self.expected),
        }


def failure(error: BaseException) -> Row:
    """What a row has instead of times."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return {"error": "out of device memory"}
    return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


def budget_bytes(attachment: Attachment, share: float) -> int:
    """Device bytes for weights with a budget of `share` of the model."""
    beside = attachment.fixed_bytes + attachment.scratch_bytes
    if share == 0:
        return beside + RING_LAYERS * max(layer.payload_bytes for layer in attachment.layers)
    return beside + math.ceil(share * attachment.payload_bytes)

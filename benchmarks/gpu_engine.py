"""What the swap engine costs on a device beside its steps: page-locking, leaving the device and coming back,
memory while the host runs ahead; and what it saves to keep what depends on prompt and time step alone."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_timer import MB, Timer, wall_seconds
from step_rigs import ComputingRig
from step_runner import budget_bytes
from torch import Tensor, nn

from lib_qswap.standalone.measure import DownloadCounter, peak_device_bytes, reset_peak_device_bytes
from lib_qswap.swap.device import device_of
from lib_qswap.swap.manager import Attachment

STEPS, SMALL_STEPS = 4, 2
PAGE_LOCK_BYTES, SMALL_PAGE_LOCK_BYTES = 1024 * MB, 8 * MB
AHEAD_SHARE = 0.25
"""Of the model, as the budget of steps that the host does not wait for."""
PROMPT_LINK_BYTES_PER_S = 12e9
"""PCIe 3.0 x 16 in practice: of a link that is the limit."""
PROMPT_SHARES = (0.25, 0.5)
IMAGE_STEPS, SMALL_IMAGE_STEPS = 8, 4

Row = dict[str, Any]


def page_locking(timer: Timer, nbytes: int) -> Row:
    """Bytes per second that memory is page-locked with, and that the device reads from it; what happens when
    page-locking is refused."""
    device = device_of(timer.device)
    if not device.can_page_lock:
        return {"can_page_lock": False}
    target = torch.empty(nbytes, dtype=torch.uint8, device=timer.device)
    pageable = torch.ones(nbytes, dtype=torch.uint8)
    begun = time.perf_counter()
    allocated = pageable.pin_memory()
    found: Row = {"can_page_lock": True, "allocator_bytes_per_s": nbytes / (time.perf_counter() - begun)}

    def rate(source: Tensor) -> float:
        return nbytes / wall_seconds(timer, lambda: target.copy_(source, non_blocking=True))

    found["from_allocator_bytes_per_s"] = rate(allocated)
    found["can_register"] = device.can_register
    if device.can_register:
        begun = time.perf_counter()
        refused = device.register(pageable)
        found |= {"register_bytes_per_s": nbytes / (time.perf_counter() - begun), "refused": refused}
        if refused is None:
            found["from_registered_bytes_per_s"] = rate(pageable)
            # Memory that is page-locked already cannot be once more.
            found["second_time"] = device.register(pageable)
            found["works_after_refusal"] = bool(torch.ones(8, device=timer.device).sum().item() == 8)
            begun = time.perf_counter()
            device.unregister(pageable.data_ptr())
            found["unregister_s"] = time.perf_counter() - begun
    return found


class Engine:
    """A model that QSwap holds, all of it in page-locked memory. steps: that are taken where several are."""

    def __init__(self, rig: ComputingRig, steps: int) -> None:
        self.rig, self.device, self.steps = rig, rig.device, steps
        self.model: nn.Module = rig.qswap_model()
        self.attachment: Attachment = rig.attach(self.model, "shared")
        self.inputs = rig.inputs(self.model)

    @torch.no_grad()
    def step(self) -> float:
        """Seconds of one step, from an idle device to an idle one."""
        self.device.synchronize()
        begun = time.perf_counter()
        self.model(*self.inputs)
        self.device.synchronize()
        return time.perf_counter() - begun

    def switching(self) -> Row:
        """The model leaves the device and comes back: its first step beside later ones, and beside what its
        bytes take on the link."""
        attachment = self.attachment
        budget = budget_bytes(attachment, 1.0)
        attachment.rebalance(budget)
        later = [self.step() for _ in range(2 * self.steps)][self.steps :]
        resident = attachment.resident_bytes
        begun = time.perf_counter()
        attachment.unload()
        unload_s = time.perf_counter() - begun
        self.device.synchronize()
        begun = time.perf_counter()
        attachment.rebalance(budget)
        back_s = time.perf_counter() - begun
        first_s = back_s + self.step()
        with DownloadCounter() as downloads:  # Once more: it takes a while to begin counting.
            attachment.unload()
        return {
            "resident_bytes": resident,
            "unload_s": unload_s,
            "d2h_bytes": downloads.nbytes,
            "first_step_s": first_s,
            "later_step_s": statistics.median(later),
            "transfer_s": resident / self.rig.link_bytes_per_s(),
        }

    @torch.no_grad()
    def running_ahead(self) -> Row:
        """The device's peak while the host issues steps without waiting, beside the budget and what a step
        takes for its activations."""
        attachment, kind = self.attachment, self.device.device
        attachment.rebalance(budget_bytes(attachment, 1.0))
        for _ in range(self.steps):
            self.step()
        reset_peak_device_bytes(kind)
        self.step()
        whole = peak_device_bytes(kind)
        attachment.rebalance(budget_bytes(attachment, AHEAD_SHARE))
        for _ in range(self.steps):
            self.step()
        reset_peak_device_bytes(kind)
        for _ in range(self.steps):
            self.model(*self.inputs)
        self.device.synchronize()
        peak = peak_device_bytes(kind)
        row: Row = {"budget_share": AHEAD_SHARE, "budget_bytes": attachment.budget_bytes}
        if whole is None or peak is None:
            return row
        beside = whole - attachment.whole_bytes  # Inputs and activations.
        allowed = attachment.budget_bytes + beside
        return row | {
            "activation_bytes": beside,
            "peak_device_bytes": peak,
            "peak_over_allowed": peak / allowed,
        }

    def close(self) -> None:
        self.attachment.detach()


def prompts(rig: ComputingRig, shares: Sequence[float], steps: int) -> list[Row]:
    """Steps over a throttled link, with some of the weights as budget, `steps` an image: of a first one, each
    of which computes its own (`own_s`, the later ones); of another image of its prompt, the later ones; and
    of an image of a new prompt, all of them, with what is computed ahead for them."""
    slower = contextlib.nullcontext() if rig.device.is_host else rig.throttled(PROMPT_LINK_BYTES_PER_S)
    with slower:
        return [_prompts(rig, share, steps) for share in shares]


@torch.no_grad()
def _prompts(rig: ComputingRig, share: float, count: int) -> Row:
    rig.clean_up()
    model, device = rig.qswap_model(), rig.device
    attachment = rig.attach(model, "shared", same_prompt=True)
    attachment.rebalance(budget_bytes(attachment, share))
    image, text, pooled, _, *others = rig.inputs(model)

    def steps(prompt: int) -> tuple[list[float], Tensor]:
        attachment.run.begin(count)
        marks = []
        for step in range(count + 1):
            marks.append(device.new_event(timing=True))
            marks[-1].record(device.current_stream())
            if step < count:
                time = torch.full((1,), 1 - step / count, device=device.device)
                output = model(image, text, pooled + prompt, time, *others)
        device.synchronize()
        return [one.elapsed_time(then) * 1e-3 for one, then in itertools.pairwise(marks)], output

    first, output = steps(0)
    steps(0)  # The plan is made for the layers that are left.
    again, same = steps(0)
    steps(1)  # What computes ahead is compiled.
    new, _ = steps(2)
    attachment.detach()
    late = count // 2
    return {
        "budget_share": share,
        "steps": count,
        "link_bytes_per_s": None if device.is_host else rig.link_bytes_per_s(),
        "own_s": statistics.fmean(first[late:]),
        "same_prompt_s": statistics.fmean(again[late:]),
        "new_prompt_s": statistics.fmean(new),
        "same_output": torch.equal(output, same),
    }


def engine(
    rig: ComputingRig,
    steps: int,
    save: Callable[[Row], None],
    *,
    shares: Sequence[float] = PROMPT_SHARES,
    image_steps: int = IMAGE_STEPS,
) -> None:
    """Calls `save` with all that is known after every part. shares, image_steps: of `prompts`."""
    held = Engine(rig, steps)
    found: Row = {"switching": held.switching()}
    save(found)
    found["running_ahead"] = held.running_ahead()
    save(found)
    held.close()
    del held
    found["prompts"] = prompts(rig, shares, image_steps)
    save(found)

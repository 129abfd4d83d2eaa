"""Forge's memory manager, with masters that never move and residency that follows the free memory.

The rule, at every `load_models_gpu`, also for models that are loaded already: what the images of this pass
need stays free, other models give up residents before any model is dropped, and the weights get the rest. A
model without packed weights that fits whole is left to Forge's own path.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from lib_qswap.quant.mapped_file import GGUFError
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.swap import ledger
from lib_qswap.swap.manager import Attachment

from . import bnb, controls, leftovers, loading, managed, settings
from .patches import Patch

MARGIN_BYTES = 64 << 20
"""Left free beyond what a pass asks for: Forge batches cond and uncond only where *more* than the need is
free."""

REGROW_SHARE = 0.02
"""A budget that grew by less than this share of the model does not make residents move; nor does one that
shrank within the margin."""


def patches() -> list[Patch]:
    from backend import memory_management as mm

    return [
        Patch(mm, "module_size", _module_size),
        Patch(mm.LoadedModel, "model_load", _model_load),
        Patch(mm.LoadedModel, "model_unload", _model_unload),
        Patch(mm, "free_memory", _free_memory),
        Patch(mm, "load_models_gpu", _load_models_gpu),
        Patch(mm, "get_free_memory", _get_free_memory),
    ]


def _model_load(original: Any, self: Any, model_gpu_memory_when_using_cpu_swap: int = -1) -> torch.nn.Module:
    if not managed.wants_care(self.model):
        return original(self, model_gpu_memory_when_using_cpu_swap)
    budget = model_gpu_memory_when_using_cpu_swap
    return managed.load(self, None if budget < 0 else budget)


def _model_unload(original: Any, self: Any, avoid_model_moving: bool = False) -> None:
    attachment = managed.attachment_of(self.model.model)
    if attachment is None:
        original(self, avoid_model_moving)
        ledger.note_unmanaged(type(self.model.model).__name__, None)
        return
    if not avoid_model_moving:
        attachment.unload()
        managed.set_manual_cast(attachment, managed=False)
        self.model.model_patches_to(self.model.offload_device)
        self.model.current_device = self.model.offload_device
    self.model.forge_unpatch_model()


def _module_size(
    _original: Any,
    module: torch.nn.Module,
    exclude_device: torch.device | None = None,
    include_device: torch.device | None = None,
    return_split: bool = False,
) -> Any:
    total = weight = 0.0
    for name, parameter in module.named_parameters():
        if parameter.device == exclude_device or (
            include_device is not None and parameter.device != include_device
        ):
            continue
        nbytes = _parameter_bytes(parameter)
        total += nbytes
        weight += nbytes if name == "weight" else 0
    return (total, weight, total - weight) if return_split else total


def _parameter_bytes(parameter: torch.Tensor) -> float:
    if isinstance(parameter, PackedTensor):
        return parameter.packed_nbytes
    element_bytes: float = parameter.element_size()
    if getattr(parameter, "quant_type", None) in ("fp4", "nf4"):
        # Forge's own estimates: a little more than half a byte an element, for the quantization state.
        element_bytes = 0.55 if element_bytes > 1 else 1.1
    return parameter.nelement() * element_bytes


# ------------------------------------------------------------------------------------------------------- room
def _get_free_memory(original: Any, dev: Any = None, torch_free_too: bool = False) -> Any:
    """What residents were given because the steps do not need it counts as free for whoever computes: it is
    given back before it is needed, and Forge goes on batching as it did when the need was measured."""
    from backend import memory_management as mm

    lent = managed.grown_bytes(mm.get_torch_device() if dev is None else dev)
    free = original(dev, torch_free_too)
    return (free[0] + lent, free[1] + lent) if torch_free_too else free + lent


def _free_bytes(device: torch.device) -> int:
    """What is free, without what is only lent to residents."""
    from backend import memory_management as mm

    return int(mm.get_free_memory(device)) - managed.grown_bytes(device)


def _own_bytes(attachment: Attachment) -> int:
    """What a managed model holds on the device, and what of the shared buffers it can use again."""
    return attachment.device_bytes() + attachment.state.shared_bytes


def _make_room(need_bytes: float, device: torch.device, keep: Sequence[Any]) -> None:
    """Frees device memory until `need_bytes` are free: residents of managed models first, least recently used
    first; then whole models. `keep`: LoadedModels that stay as they are."""
    from backend import memory_management as mm

    others = [
        other for other in reversed(mm.current_loaded_models) if other.device == device and other not in keep
    ]
    elsewhere = managed.generation_runs_elsewhere()
    for other in others:
        missing = need_bytes - _free_bytes(device)
        attachment = managed.attachment_of(other.model.model)
        if missing > 0 and attachment is not None and attachment.active:
            if elsewhere and attachment.is_running:
                attachment.adaptation.give_back(int(missing) + 1, "another model needs device memory, and")
            else:
                attachment.give_up(int(missing) + 1)
    for other in others:
        if _free_bytes(device) > need_bytes:
            break
        attachment = managed.attachment_of(other.model.model)
        if attachment is not None and (
            not attachment.device_bytes() or (elsewhere and attachment.is_running)
        ):
            continue
        index = next(i for i, loaded in enumerate(mm.current_loaded_models) if loaded is other)
        ledger.log.info("unloads %s to make room", type(other.model.model).__name__)
        mm.current_loaded_models.pop(index).model_unload()
        mm.soft_empty_cache()


def _drop_abandoned(wanted: Sequence[Any]) -> None:
    """Models that nobody but the list of loaded models holds any more. Not those of which another patcher is
    wanted, or may be: every image with a LoRA or a ControlNet has a patcher of its own for one model."""
    from backend import memory_management as mm

    for index in range(len(mm.current_loaded_models) - 1, -1, -1):
        loaded = mm.current_loaded_models[index]
        # Two references: the LoadedModel's, and the one that this call makes.
        if sys.getrefcount(loaded.model) > 2 or any(one.model is loaded.model.model for one in wanted):
            continue
        if managed.attachment_of(loaded.model.model) is None:
            mm.current_loaded_models.pop(index).model_unload(avoid_model_moving=True)
        elif not _is_held_by_others(loaded):
            mm.current_loaded_models.pop(index).model_unload()


def _is_held_by_others(loaded: Any) -> bool:
    """Whether anybody but this LoadedModel, its patcher and the model itself holds the model: another patcher
    does."""
    model = loaded.model.model
    own = 1  # the patcher's
    own += getattr(loaded, "real_model", None) is model
    own += getattr(getattr(model, "lora_loader", None), "model", None) is model
    return sys.getrefcount(model) > own + 2  # the one here, and that of this call


def _free_memory(
    original: Any,
    memory_required: float,
    device: torch.device,
    keep_loaded: Sequence[Any] = (),
    free_all: bool = False,
) -> None:
    if managed.why_not_served(device):
        original(memory_required, device, list(keep_loaded), free_all)
        return
    with managed.turn_of(device):
        _free(memory_required, device, keep_loaded, free_all)


def _free(memory_required: float, device: torch.device, keep_loaded: Sequence[Any], free_all: bool) -> None:
    _drop_abandoned([])
    if free_all or memory_required >= 1e29 or _offloads_others():
        _unload_all(device, keep_loaded)
    else:
        _make_room(memory_required, device, keep_loaded)


def _offloads_others() -> bool:
    """Whether the user wants no model on the device but those that run, --always-offload-from-vram or Never
    OOM, and none of the others runs in another thread."""
    from backend import memory_management as mm

    wanted = mm.ALWAYS_VRAM_OFFLOAD or mm.vram_state == mm.VRAMState.NO_VRAM
    return bool(wanted) and not managed.generation_runs_elsewhere()


def _unload_all(device: torch.device, keep_loaded: Sequence[Any]) -> None:
    from backend import memory_management as mm

    for loaded in [other for other in mm.current_loaded_models if other.device == device]:
        if loaded not in keep_loaded:
            index = next(i for i, other in enumerate(mm.current_loaded_models) if other is loaded)
            mm.current_loaded_models.pop(index).model_unload()
    mm.soft_empty_cache()


# ------------------------------------------------------------------------------------------------------- load
def _load_models_gpu(
    original: Any, models: Sequence[Any], memory_required: float = 0, hard_memory_preservation: float = 0
) -> None:
    from backend import memory_management as mm

    for patcher in models:
        _check_files(patcher)
    not_served = {
        type(patcher.model).__name__: reason
        for patcher in models
        if (reason := managed.why_not_served(patcher.load_device))
    }
    for name, reason in not_served.items():
        ledger.note_unmanaged(name, reason)
    if not_served or mm.vram_state == mm.VRAMState.HIGH_VRAM:
        original(models, memory_required, hard_memory_preservation)
        return
    with contextlib.ExitStack() as turns:
        for device in sorted({patcher.load_device for patcher in models}, key=str):
            turns.enter_context(managed.turn_of(device))
        _place(models, memory_required, hard_memory_preservation)


def _place(models: Sequence[Any], memory_required: float, hard_memory_preservation: float) -> None:
    """Loads `models`, or brings those that are loaded in line with the memory that is free now. Between two
    steps, where a generation runs in another thread: it goes on with the weights that are left to it."""
    from backend import memory_management as mm

    started = time.perf_counter()
    if managed.generation_runs_elsewhere():
        managed.end_measuring()
    else:
        managed.rest_all_but([patcher.model for patcher in models])
    minimum = controls.inference_minimum_bytes()
    inference = max(minimum, memory_required) + hard_memory_preservation + MARGIN_BYTES
    _adopt_clones(models)
    _drop_abandoned(models)
    keep: list[Any] = [
        loaded for loaded in mm.current_loaded_models if any(loaded.model is patcher for patcher in models)
    ]
    for device in {patcher.load_device for patcher in models}:
        if _offloads_others():
            _unload_all(device, keep)
        if leftovers.collect(device, _free_bytes(device)):
            mm.soft_empty_cache()
    # The last of the list first, so that the first ends up where Forge looks for the most recently used.
    for patcher in reversed(models):
        loaded = next((one for one in keep if one.model is patcher), None)
        _balance(patcher, loaded, inference, keep)
    for device in {patcher.load_device for patcher in models}:
        _report_shortage(device, inference - MARGIN_BYTES)
    if (took := time.perf_counter() - started) > 0.1:
        names = ", ".join(type(patcher.model).__name__ for patcher in models)
        ledger.log.info("placing %s took %.2f s", names, took)


def _check_files(patcher: Any) -> None:
    """Raises GGUFError when a file that this model is read from is no longer what it was; the next generation
    opens it anew."""
    try:
        managed.check_files(patcher.model)
    except GGUFError as error:
        ledger.message(str(error), "error")
        loading.expect_no_model()
        raise


def _report_shortage(device: torch.device, inference_bytes: float) -> None:
    from backend import memory_management as mm

    free = mm.get_free_memory(device)
    if free < inference_bytes:
        ledger.message(
            f"This pass asks for {inference_bytes / 2**20:.0f} MB beside the weights, and "
            f"{free / 2**20:.0f} MB are free: Forge may compute it in smaller pieces, which can change "
            "the last bits of the image."
        )


def _balance(patcher: Any, loaded: Any, inference_bytes: float, keep: list[Any]) -> None:
    """Loads one model, or brings it in line with the memory that is free now."""
    from backend import memory_management as mm

    device = patcher.load_device
    attachment = managed.attachment_for(patcher) if managed.wants_care(patcher) else None
    if attachment is not None:
        need = _limited(attachment.whole_bytes) - _own_bytes(attachment)
    else:
        need = mm.module_size(patcher.model, exclude_device=device)
    _make_room(need + inference_bytes, device, keep)
    available = _free_bytes(device) - inference_bytes
    if attachment is None:
        is_bnb = bnb.is_bnb(patcher.model)
        # The user's limit is one for models that would fit as well, and so is Never OOM.
        if need <= available and mm.module_size(patcher.model) <= _limited(sys.maxsize):
            packed = "is computed by bitsandbytes" if is_bnb else "has no packed weights"
            _leave_to_host(patcher, loaded, keep, f"fits whole and {packed}")
            return
        reason = managed.refusal(patcher.model) or (bnb.refusal(patcher) if is_bnb else None)
        if reason:
            _leave_to_host(patcher, loaded, keep, reason, int(max(0, available)))
            return
        if loaded is not None:  # It was whole on the device, and this pass needs the room.
            mm.current_loaded_models.remove(loaded)
            keep.remove(loaded)
            loaded.model_unload()
            loaded = None
        if mm.module_size(patcher.model) > mm.module_size(patcher.model, exclude_device=device):
            # It is still there: in the name of a patcher that this one was cloned from.
            patcher.forge_unpatch_model(torch.device("cpu"))
            mm.soft_empty_cache()
        available = _free_bytes(device) - inference_bytes
        if is_bnb and (reason := _taking_over_fails(patcher)):
            _leave_to_host(patcher, None, keep, reason, int(max(0, available)))
            return
        attachment = managed.attachment_for(patcher)
    others = _share_limit(patcher.model, attachment, keep)
    own = _own_bytes(attachment)
    available = _free_bytes(device) - inference_bytes
    budget = _limited(available + own, others)
    spare = _limited(available + own + inference_bytes, others) - budget
    if attachment.crowded_bytes:
        budget = max(0, min(budget, attachment.whole_bytes) - attachment.crowded_bytes)
        spare = max(0, spare - attachment.crowded_bytes)
    try:
        if loaded is None:
            loaded = mm.LoadedModel(patcher)
            keep.append(loaded)
            managed.load(loaded, budget, spare)
        else:
            mm.current_loaded_models.remove(loaded)
            had = attachment.asked_bytes
            more = attachment.payload_bytes * REGROW_SHARE
            less = MARGIN_BYTES // 2
            in_force = max(budget, attachment.floor_bytes)
            if had is None or not had - less <= in_force <= had + more or spare < attachment.spare_bytes:
                attachment.rebalance(budget, spare_bytes=spare)
            else:
                _wake(attachment, budget)
    except (GGUFError, OSError) as error:
        # The file cannot be read, in Forge's own way neither.
        attachment.unload()
        ledger.message(f"{attachment.name}: {error}", "error")
        loading.expect_no_model()
        raise
    except Exception as error:
        # Whatever it is: Forge's own way may still make the image. It raises again what is not QSwap's fault.
        managed.refuse(patcher.model)
        try:
            loaded.model_load(0)
        except Exception:
            managed.stop_refusing(patcher.model)
            raise
        ledger.message(
            f"{attachment.name}: {type(error).__name__}: {str(error).rstrip('.')}. Forge moves the layers of "
            "this model itself until it is loaded again.",
            "warning",
        )
    mm.current_loaded_models.insert(0, loaded)


def _taking_over_fails(patcher: Any) -> str | None:
    """Packs the weights of bitsandbytes; returns why it could not be done. Forge can go on with those packed
    before."""
    try:
        bnb.take_over(patcher)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _wake(attachment: Attachment, budget_bytes: int) -> None:
    try:
        attachment.wake()
    except torch.cuda.OutOfMemoryError:
        attachment.rebalance(budget_bytes)


def _leave_to_host(patcher: Any, loaded: Any, keep: list[Any], reason: str, budget_bytes: int = -1) -> None:
    """Forge's own path: the whole model onto the device, or as much of it as Forge puts into the budget."""
    from backend import memory_management as mm

    name = type(patcher.model).__name__
    if loaded is not None:
        mm.current_loaded_models.remove(loaded)
    else:
        loaded = mm.LoadedModel(patcher)
        loaded.model_load(budget_bytes)
        keep.append(loaded)
    mm.current_loaded_models.insert(0, loaded)
    ledger.note_unmanaged(name, f"left to Forge: {reason}")


def _share_limit(model: torch.nn.Module, attachment: Attachment, keep: Sequence[Any]) -> int:
    """Lets other models give up residents that would be more than the user allows, together with this one's;
    returns the device bytes that they have then. `keep`: LoadedModels that stay as they are.

    A text encoder, which runs once a prompt, takes only what others leave, or the least it runs with: what
    they gave up for it would travel twice.
    """
    from backend import memory_management as mm

    limit = _limited(sys.maxsize)
    if limit == sys.maxsize:
        return 0
    is_sampled = getattr(model, "diffusion_model", None) is not None
    wanted = min(limit, attachment.whole_bytes if is_sampled else attachment.floor_bytes)
    loaded = {managed.attachment_of(one.model.model): one for one in reversed(mm.current_loaded_models)}
    others = [one for one in loaded if one not in (None, attachment) and one.device is attachment.device]
    for other in others:
        excess = sum(one.device_bytes() for one in others) + wanted - limit
        runs = other.is_running and managed.generation_runs_elsewhere()
        if excess > 0 and other.active and loaded[other] not in keep and not runs:
            other.give_up(excess)
    return sum(one.device_bytes() for one in others)


def _limited(budget_bytes: float, others_bytes: int = 0) -> int:
    """`budget_bytes`, within what the user allows, of which other models have some."""
    from backend import memory_management as mm

    chosen = settings.in_effect()
    limits = [controls.weight_limit_bytes()]
    if chosen.location != "gpu":
        limits.append(chosen.gpu_budget_bytes)
    if mm.vram_state == mm.VRAMState.NO_VRAM:
        limits.append(0)
    allowed = [limit - others_bytes for limit in limits if limit is not None]
    return int(max(0, min([budget_bytes, *allowed])))


def _adopt_clones(models: Sequence[Any]) -> None:
    """A wanted patcher takes the place of a loaded one of the same model: nothing is moved for it."""
    from backend import memory_management as mm

    for patcher in models:
        for index in range(len(mm.current_loaded_models) - 1, -1, -1):
            other = mm.current_loaded_models[index]
            if other.model is not patcher and patcher.is_clone(other.model):
                mm.current_loaded_models.pop(index).model_unload(avoid_model_moving=True)

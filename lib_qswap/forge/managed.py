"""Models that QSwap serves inside Forge: which they are, and their way in and out.

State belongs to the real model, by weak reference, and not to Forge's patchers, which come and go with every
LoRA.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

from lib_qswap.quant import kernels
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.swap import ledger
from lib_qswap.swap.conditioning import FLUX, SD3, Conditioning
from lib_qswap.swap.device import device_of, has_module
from lib_qswap.swap.device_state import state_of
from lib_qswap.swap.layer import Layer
from lib_qswap.swap.manager import Attachment
from lib_qswap.swap.ram import give_back_freed_ram

from . import notices, positions, settings

_attachments: weakref.WeakKeyDictionary[torch.nn.Module, Attachment] = weakref.WeakKeyDictionary()
_layers: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Attachment, Layer]] = weakref.WeakKeyDictionary()
_refused: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_gathered: weakref.WeakKeyDictionary[torch.nn.Module, torch.dtype] = weakref.WeakKeyDictionary()

_CONDITIONINGS = {"IntegratedFluxTransformer2DModel": FLUX, "MMDiTX": SD3}
"""By the name of the network's class."""


def attachment_of(model: torch.nn.Module) -> Attachment | None:
    return _attachments.get(model)


def managed_layer(module: torch.nn.Module, device: torch.device) -> tuple[Attachment, Layer] | None:
    """Who serves the weights of `module` on `device`; None: Forge does."""
    found = _layers.get(module)
    return found if found is not None and found[0].active and found[0].device.device == device else None


def gathered_dtype(module: torch.nn.Module) -> torch.dtype | None:
    """The dtype that a gathered embedding's rows are wanted in; None: it is not gathered."""
    return _gathered.get(module)


def has_packed_weights(model: torch.nn.Module) -> bool:
    return any(isinstance(parameter, PackedTensor) for parameter in model.parameters())


def check_files(model: torch.nn.Module) -> None:
    """Looks whether the files that `model` is read from while it computes are the ones that were opened.

    Raises:
        GGUFError: one of them has been changed, or is gone.
    """
    attachment = attachment_of(model)
    if attachment is not None:
        attachment.check_files()
        return
    weights = [weight for weight in model.parameters() if isinstance(weight, PackedTensor)]
    for file in {weight.source.file for weight in weights if weight.source is not None}:
        file.check_unchanged()


def attach_engine(engine: Any) -> None:
    """A checkpoint was loaded: its packed models come under care at once, so that the page shows them before
    they run."""
    give_back_freed_ram()  # The earlier checkpoint's, and what loading this one took.
    for patcher in _patchers(engine):
        if not why_not_served(patcher.load_device) and has_packed_weights(patcher.model):
            attachment_for(patcher)
            if text := kernels.could_be_faster(patcher.load_device.type):
                notices.notice(text, once=True)


def note_progress(engine: Any, step: int, of: int, times: Callable[[], torch.Tensor | None]) -> None:
    """Sampling step number `step` (from 1) of `of` begins: nothing is fetched for a step after the last.

    times: gives `Run.times`; asked in the first step, where something depends on them.
    """
    attachment = _attachments.get(engine.forge_objects.unet.model)
    if attachment is not None:
        run = attachment.run
        run.progress(step, of)
        if step == 1 and run.times is None and attachment.idle.conditioning is not None:
            run.times = times()


def _patchers(engine: Any) -> Iterable[Any]:
    objects = getattr(engine, "forge_objects", None)
    for name in ("clip", "unet", "vae"):
        found = getattr(objects, name, None)
        if found is not None:
            yield getattr(found, "patcher", found)


def attachment_for(patcher: Any) -> Attachment:
    model = patcher.model
    attachment = _attachments.get(model)
    chosen = settings.in_effect()
    if attachment is None:
        attachment = Attachment(
            model,
            device_of(patcher.load_device),
            name=type(model).__name__,
            location=chosen.location,
            pin_budget_bytes=chosen.pin_budget_bytes,
            ring_bytes=chosen.ring_bytes,
            arithmetic=chosen.arithmetic,
            compute_dtype=_compute_dtype(model),
            can_swap=_can_swap,
            roots=_roots(model),
            borrows=_borrows,
            stays_on_host=positions.stays_on_host,
            conditioning=_conditioning(model),
        )
        attachment.modules.keep_outputs(attachment)
        attachment.idle.added = _online_loras
        _attachments[model] = attachment
        positions.copy_crop_once(attachment)
        for layer in attachment.layers:
            module = layer.module()
            if module is not None:
                _layers[module] = (attachment, layer)
        for reference in attachment.gathered:
            embedding = reference()
            if embedding is not None:
                _keep_on_host(embedding)
        for borrower in attachment.inventory.borrowers:
            _keep_borrowed(borrower)
    attachment.configure(
        location=chosen.location,
        pin_budget_bytes=chosen.pin_budget_bytes,
        ring_bytes=chosen.ring_bytes,
        arithmetic=chosen.arithmetic,
        keeps_outputs=chosen.keeps_outputs,
    )
    return attachment


def _compute_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """What its layers are computed in: the widest for text encoders, whose engines feed them fp32."""
    announced = getattr(model, "computation_dtype", None)
    if isinstance(announced, torch.dtype):
        return announced
    return torch.float32 if has_packed_weights(model) else None


def _can_swap(module: torch.nn.Module) -> bool:
    return hasattr(module, "parameters_manual_cast") and getattr(module, "weight", None) is not None


def _borrows(module: torch.nn.Module) -> bool:
    """CLIP's token embedding stands inside a wrapper for textual inversion, which has its weight as well."""
    wrapped = module._modules.get("wrapped")
    return isinstance(wrapped, torch.nn.Embedding) and module._parameters.get("weight") is wrapped.weight


def _roots(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules whose forward is one pass over the weights."""
    network = getattr(model, "diffusion_model", None)
    if network is not None:
        return [network]
    halves = [getattr(model, name) for name in ("encoder", "decoder") if hasattr(model, name)]
    if halves:
        return halves
    if type(model).forward is not torch.nn.Module.forward:  # a ControlNet
        return [model]
    # A text encoder is a dictionary of encoders, each a wrapper around the network that is called.
    return [getattr(child, "transformer", child) for child in model.children()] or [model]


def _online_loras(module: torch.nn.Module) -> Hashable:
    """The LoRAs that Forge's forward adds, with their strengths: other extensions change these in place.
    Forge moves their matrices after each run, into other tuples in the same lists."""
    return tuple(
        (name, id(patch), *map(str, (patch[0], patch[2])))
        for name, patches in getattr(module, "forge_online_loras", {}).items()
        for patch in patches
    )


def _conditioning(model: torch.nn.Module) -> Conditioning | None:
    """What layers of the model's network depend on the conditioning alone, where it is one that is known."""
    network = getattr(model, "diffusion_model", None)
    known = _CONDITIONINGS.get(type(network).__name__)
    return known if network is not None and known is not None and known.fits(network) else None


def _keep_on_host(module: torch.nn.Embedding) -> None:
    """The embedding stays where it is when Forge moves it; only the dtype that it asks for is noted, for the
    rows."""
    reference = weakref.ref(module)
    _gathered[module] = module.weight.dtype

    def note_dtype(function: Any, recurse: bool = True) -> torch.nn.Module:
        embedding = reference()
        assert embedding is not None
        _gathered[embedding] = function(torch.empty(0, dtype=_gathered[embedding])).dtype
        return embedding

    module.__dict__["_apply"] = note_dtype


def _keep_borrowed(reference: weakref.ref[torch.nn.Module]) -> None:
    """A wrapper around such an embedding passes on where it is moved, and keeps the weight that it
    borrows."""

    def pass_on(function: Any, recurse: bool = True) -> torch.nn.Module:
        borrower = reference()
        assert borrower is not None
        for child in borrower.children():
            child._apply(function, recurse)
        return borrower

    wrapper = reference()
    if wrapper is not None:
        wrapper.__dict__["_apply"] = pass_on


def release(attachment: Attachment, model: torch.nn.Module) -> None:
    """Gives one model back to Forge as it was made: its own flags, its parameters on the CPU, packed."""
    with contextlib.ExitStack() as stack:  # All of it, the last one first, whatever goes wrong.
        stack.callback(_forget, attachment, model)
        stack.callback(attachment.detach)
        stack.callback(positions.restore, attachment)
        stack.callback(set_manual_cast, attachment, managed=False)


def _forget(attachment: Attachment, model: torch.nn.Module) -> None:
    """It is served no more."""
    kept: list[weakref.ref[Any]] = [*attachment.gathered, *attachment.inventory.borrowers]
    for reference in kept:
        module = reference()
        if module is not None:
            module.__dict__.pop("_apply", None)
            _gathered.pop(module, None)
    for layer in attachment.layers:
        module = layer.module()
        if module is not None:
            _layers.pop(module, None)
    _attachments.pop(model, None)


def turn_of(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside, no other thread runs a step on `device`, or places models there."""
    return state_of(device_of(device)).turn.held()


def generation_runs_elsewhere() -> bool:
    """Whether a generation is going on in another thread than the calling one: what this one loads (a
    preprocessor for its preview, an interrogator) is not for it."""
    thread = settings.generation_thread()
    if thread is not None:
        return thread != threading.get_ident()
    return any(attachment.runs_elsewhere for attachment in list(_attachments.values()))


def rest_all_but(models: Sequence[torch.nn.Module]) -> None:
    """Only these models run next: the others need no ring and no scratch meanwhile."""
    for model, attachment in list(_attachments.items()):
        if not any(model is one for one in models):
            attachment.rest()


def end_measuring() -> None:
    """What is loaded now is no part of what a step needs."""
    for attachment in list(_attachments.values()):
        attachment.adaptation.profile.close()


def refuse(model: torch.nn.Module) -> None:
    """QSwap could not serve this model: Forge has it until it is loaded again."""
    _refused.add(model)
    attachment = _attachments.get(model)
    if attachment is not None:
        release(attachment, model)


def stop_refusing(model: torch.nn.Module) -> None:
    """Forge could not serve it either: what was wrong was not QSwap's."""
    _refused.discard(model)


def refusal(model: torch.nn.Module) -> str | None:
    """Why Forge has this model; None: it has not been refused."""
    return "QSwap could not serve it" if model in _refused else None


def release_all() -> None:
    """Gives every model back, for switching off; each, whatever goes wrong with another."""
    for model, attachment in list(_attachments.items()):
        try:
            release(attachment, model)
        except Exception as error:
            notices.notice(
                f"{attachment.name} could not be given back: {type(error).__name__}: "
                f"{str(error).rstrip('.')}. If the next image fails, restart the web UI.",
                "error",
            )
    ledger.forget_unmanaged()


def why_not_served(device: torch.device) -> str | None:
    """Why models that compute on `device` are left to Forge; None: they need not be."""
    if device.type == "cpu":
        return "computed on the CPU: nothing is swapped"
    return None if has_module(device) else f"PyTorch gives no control over the memory of {device}"


def wants_care(patcher: Any) -> bool:
    """Whether QSwap serves this model whether or not it fits."""
    if why_not_served(patcher.load_device) or patcher.model in _refused:
        return False
    return patcher.model in _attachments or has_packed_weights(patcher.model)


def grown_bytes(device: torch.device) -> int:
    """Device bytes that running models were given because their steps do not need them."""
    return sum(
        attachment.grown_bytes
        for attachment in list(_attachments.values())
        if attachment.device.device == device and attachment.is_running
    )


def load(loaded: Any, budget_bytes: int | None, spare_bytes: int = 0) -> torch.nn.Module:
    """As LoadedModel.model_load, for a model whose weights QSwap serves; `spare_bytes` as in
    `Attachment.rebalance`.

    Raises:
        what attaching or a LoRA raised; the model is then as it was before, and nothing of it is on the
        device.
    """
    patcher = loaded.model
    patcher.model_patches_to(loaded.device)
    patcher.model_patches_to(patcher.model_dtype())
    attachment = None
    try:
        loaded.real_model = patcher.forge_patch_model(None)
        patcher.current_device = patcher.load_device
        attachment = attachment_for(patcher)
        patcher.refresh_loras()
        set_manual_cast(attachment, managed=True)
        attachment.rebalance(budget_bytes, spare_bytes=spare_bytes)
        if not hasattr(patcher.model, "diffusion_model"):
            attachment.run.begin(1)  # Encoders run once: nothing is fetched for a second time.
    except BaseException:
        if attachment is not None:
            attachment.unload()
            set_manual_cast(attachment, managed=False)
        patcher.forge_unpatch_model()
        patcher.current_device = patcher.offload_device
        raise
    patcher.model.gguf_baked = True
    ledger.note_unmanaged(attachment.name, None)
    return loaded.real_model


def set_manual_cast(attachment: Attachment, *, managed: bool) -> None:
    """Forge's layers ask for their weights through weights_manual_cast only if this flag is set."""
    for layer in attachment.layers:
        module: Any = layer.module()
        if module is None:
            continue
        if managed and "prev_parameters_manual_cast" not in module.__dict__:
            module.prev_parameters_manual_cast = module.parameters_manual_cast
            module.parameters_manual_cast = True
        elif not managed and "prev_parameters_manual_cast" in module.__dict__:
            module.parameters_manual_cast = module.prev_parameters_manual_cast
            del module.prev_parameters_manual_cast

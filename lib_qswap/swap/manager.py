"""Models under QSwap's care: attach, rebalance, unload, detach. The only class that the outside talks to is
`Attachment`."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, get_args

import torch

from lib_qswap.quant.unpack import Arithmetic
from lib_qswap.swap import ledger, profile
from lib_qswap.swap.adaptation import Adaptation
from lib_qswap.swap.arena import (
    BUDGET_USED_UP,
    fill_arena,
    leave_arenas,
    lock_in_place,
    unlock_in_place,
    use_file,
    whole_arenas,
)
from lib_qswap.swap.conditioning import Asked, Conditioning
from lib_qswap.swap.device import ALIGNMENT_BYTES, Device, align, device_of
from lib_qswap.swap.device_state import state_of
from lib_qswap.swap.home import LOCATIONS, Location, choose_homes, default_pin_budget_bytes, has_file
from lib_qswap.swap.idle_layers import IdleLayers
from lib_qswap.swap.inventory import Inventory
from lib_qswap.swap.layer import Layer
from lib_qswap.swap.lease import AnyLease
from lib_qswap.swap.module_hooks import ModuleHooks, is_attached
from lib_qswap.swap.planner import Plan
from lib_qswap.swap.plans import Plans
from lib_qswap.swap.profile import Work
from lib_qswap.swap.run import Run

LONGEST_STEP_S = 600.0
"""A run whose last step began longer ago was broken off."""

ASSUMED_LINK_BYTES_PER_S = 12e9
"""What a plan is made from until the first copies are measured: PCIe 3 x16."""


class Attachment:
    """One model whose weights are kept where the user says and brought to the device in time.

    Attributes:
        device: where it computes.
        location: the user's choice of home.
        layers: those that can be swapped, in the order of execution as far as it is known.
        run: which step of how many the model is at.
        plan: the last one; None while nothing is on the device.
        budget_bytes: device bytes for weights that are in force; None: not decided yet, or no longer right.
        spare_bytes: what may be given on top of the budget that was asked for.
        grown_bytes: the part of it that was given on top, since steps turned out not to need it.
        crowded_bytes: what was given back for good, because the allocator needs more than steps do.
        used_at: when its last forward began, in seconds since 1970; 0 before the first one.
        kept: what the host itself keeps on the device for this model, as long as it runs.
        idle: the layers that the present steps do without.
    """

    _serials = itertools.count()

    def __init__(
        self,
        module: torch.nn.Module,
        device: Device,
        *,
        name: str,
        location: Location,
        pin_budget_bytes: int | None,
        ring_bytes: int | None,
        arithmetic: Arithmetic,
        compute_dtype: torch.dtype | None,
        can_swap: Callable[[torch.nn.Module], bool],
        roots: Sequence[torch.nn.Module] | None,
        borrows: Callable[[torch.nn.Module], bool] = lambda _module: False,
        stays_on_host: Callable[[torch.nn.Module, str], bool] = lambda _module, _name: False,
        conditioning: Conditioning | None = None,
    ) -> None:
        self.serial = next(self._serials)
        self.name = name
        self.device = device
        self.location = location
        self.state = state_of(device)
        self._limit_pins(pin_budget_bytes)
        self.arithmetic: Arithmetic = arithmetic
        self.compute_dtype = compute_dtype
        self.plan: Plan | None = None
        self.budget_bytes: int | None = None
        self.run = Run()
        self._ring_bytes = ring_bytes
        self._pin_budget_bytes = pin_budget_bytes
        self.spare_bytes = 0
        self.grown_bytes = 0
        self.crowded_bytes = 0
        self.used_at = 0.0
        self._ran_in: int | None = None
        self.adaptation = Adaptation(self)
        self._plans = Plans()
        self.kept: dict[object, torch.Tensor] = {}
        self.inventory = Inventory(module, can_swap, borrows, stays_on_host)
        self.layers = self.inventory.layers
        self.gathered = self.inventory.gathered
        self.roots = [weakref.ref(root) for root in (roots if roots is not None else [module])]
        self._root_keys = [id(reference()) for reference in self.roots]
        self.idle = IdleLayers(self, conditioning)
        self.modules = ModuleHooks(self)
        ledger.register(self)
        self._trainable = [
            (weakref.ref(one), key)
            for one in module.modules()
            for key, parameter in one._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        # The attachment holds its modules weakly, and lives as long as its model does.
        self._finalizer = weakref.finalize(module, _module_gone, self)
        self._finalizer.atexit = False

    # ------------------------------------------------------------------------------------------------ numbers
    @property
    def payload_bytes(self) -> int:
        return sum(layer.payload_bytes for layer in self.layers)

    @property
    def fixed_bytes(self) -> int:
        return self.inventory.fixed_bytes

    @property
    def resident_bytes(self) -> int:
        return sum(layer.payload_bytes for layer in self.layers if layer.resident is not None)

    @property
    def whole_bytes(self) -> int:
        """Device bytes with which every layer is resident."""
        return self.payload_bytes + self.fixed_bytes + self.scratch_bytes

    @property
    def scratch_bytes(self) -> int:
        """What unpacking, or casting, the largest weight takes, with its bias behind it."""
        largest = 0
        for layer in self.layers:
            parts = {part.name: part for part in layer.parts}
            weight, bias = parts.get("weight"), parts.get("bias")
            if weight is None:
                continue
            own = weight.dtype_on_device
            # What comes from a file of quantized weights is mostly computed with in 16 bits.
            usual = torch.float16 if own is None or (weight.format is not None and own.itemsize > 2) else own
            dtype = self.compute_dtype or usual
            if own != dtype:
                nbytes = align(weight.shape.numel() * dtype.itemsize)
                if bias is not None:
                    nbytes += bias.shape.numel() * max(dtype.itemsize, bias.dtype.itemsize)
                largest = max(largest, nbytes)
        return largest

    def needs_worker(self) -> bool:
        """Whether a transfer of this model cannot be read from page-locked memory by the device itself."""
        return any(not layer.home.page_locked for layer in self.layers)

    def device_bytes(self) -> int:
        """Device bytes for this model's weights, without ring and scratch."""
        return (self.fixed_bytes if self.active else 0) + self.resident_bytes

    @property
    def asked_bytes(self) -> int | None:
        """The budget in force without what was given on top of it."""
        return None if self.budget_bytes is None else self.budget_bytes - self.grown_bytes

    @property
    def running_layers(self) -> list[Layer]:
        """Those that the present steps compute."""
        return [layer for layer in self.layers if layer not in self.idle.layers]

    @property
    def swapped_bytes(self) -> int:
        """What travels in each of them."""
        return sum(layer.payload_bytes for layer in self.running_layers if layer.resident is None)

    @property
    def active(self) -> bool:
        return self.plan is not None

    @property
    def runs_elsewhere(self) -> bool:
        """Whether another thread than the calling one is in the midst of a run of it."""
        return (
            self.is_running
            and self.run.goes_on is True
            and self._ran_in != threading.get_ident()
            and time.time() - self.used_at < LONGEST_STEP_S
        )

    @property
    def is_running(self) -> bool:
        """Whether it is among the models that run now: ring and scratch are there for it."""
        return self in self.state.active

    def configure(
        self,
        *,
        location: Location,
        pin_budget_bytes: int | None,
        ring_bytes: int | None,
        arithmetic: Arithmetic,
        keeps_outputs: bool = True,
    ) -> None:
        """Other choices of the user; they take effect with the next `rebalance`, which they make necessary
        where they differ."""
        if (keeps_outputs, arithmetic) != (self.idle.allowed, self.arithmetic):
            self.idle.allowed = keeps_outputs
            self.idle.forget()
            self.budget_bytes = None
        if (location, ring_bytes, arithmetic) != (self.location, self._ring_bytes, self.arithmetic) or (
            pin_budget_bytes != self._pin_budget_bytes
        ):
            self.location, self._ring_bytes, self.arithmetic = location, ring_bytes, arithmetic
            self._pin_budget_bytes = pin_budget_bytes
            self._limit_pins(pin_budget_bytes)
            self.budget_bytes = None

    def _limit_pins(self, nbytes: int | None) -> None:
        budget = self.state.pin_budget
        budget.limit_bytes = default_pin_budget_bytes(budget.used_bytes) if nbytes is None else nbytes

    # ------------------------------------------------------------------------------------------------ balance
    def rebalance(self, budget_bytes: int | None = None, *, spare_bytes: int = 0) -> None:
        """Brings the device copies in line with `budget_bytes` (fixed, residents, ring and scratch together).

        None: what the device has free now, less an eighth for activations. `spare_bytes`: what may be taken
        on top of the budget once the first steps have shown that they can do without it. Only between
        forwards. A budget below the floor is raised to it, and a device that turns out to have less than the
        budget gets less, each with a message.

        Raises:
            TypeError, ValueError: a number of bytes is none, or below zero.
            RuntimeError: it is detached.
            torch.OutOfMemoryError: the device has no room even for the floor; nothing is left on it.
        """
        _check_bytes("budget_bytes", budget_bytes)
        _check_bytes("spare_bytes", spare_bytes)
        if not self._finalizer.alive:
            raise RuntimeError(f"{self.name} is detached: attach it again")
        with self.state.turn.held():
            self.state.enter()
            if budget_bytes is None:
                free, _ = self.device.memory_bytes()
                usable = free + self.device_bytes() + self.state.shared_bytes
                budget_bytes = usable * 7 // 8
                spare_bytes = usable - budget_bytes
            self.spare_bytes, self.grown_bytes = spare_bytes, 0
            self.adaptation.profile.reconsider()
            self.fit_into(budget_bytes)

    def fit_into(self, budget_bytes: int) -> None:
        """`rebalance` to a budget that steps have shown to be better; what they have shown stays known."""
        while True:
            try:
                with self.state.changing():
                    self._balance(budget_bytes)
                return
            except torch.cuda.OutOfMemoryError:  # the name that torch 2.3 has as well, for every device
                had, grown = budget_bytes, self.grown_bytes
                self.unload()
                self.device.empty_cache()
                floor = self.floor_bytes
                if had <= floor:
                    raise
                budget_bytes = max(floor, had * 4 // 5)
                self.grown_bytes = max(0, grown - (had - budget_bytes))
                ledger.message(
                    f"{self.name}: the device has no room for {had / 2**20:.0f} MB of weights; trying "
                    f"{budget_bytes / 2**20:.0f} MB. Close other programs that use the GPU, or give the "
                    "weights less of its memory.",
                    "warning",
                )

    @property
    def floor_bytes(self) -> int:
        """The least budget that it runs with."""
        largest = max((layer.payload_bytes for layer in self.layers), default=0)
        return self.fixed_bytes + self.scratch_bytes + largest

    def _balance(self, budget_bytes: int) -> None:
        if self.whole_bytes <= budget_bytes:
            self.idle.layers = frozenset()  # There is nothing to be saved.
        plan = self.make_plan(budget_bytes)
        floor = self.floor_bytes
        if budget_bytes < floor:
            ledger.message(
                f"{self.name}: {budget_bytes / 2**20:.0f} MB of device memory are too few; "
                f"{floor / 2**20:.0f} MB are used, for fixed weights, unpacking and the largest layer."
            )
        elif plan.message:
            ledger.message(f"{self.name}: {plan.message}", "warning")
        resident = set(plan.resident)
        self.state.streamer.quiesce()
        self.state.streamer.evict(
            [lay for lay in self.layers if lay.resident is not None and lay.name not in resident]
        )
        self.budget_bytes = max(budget_bytes, floor)
        if self.location in ("shared", "cpu", "disk"):
            self._place(self.layers)
        else:
            self._place([layer for layer in self.layers if layer.name not in resident])
        was_active = self.active
        self.plan = plan
        self.state.streamer.use_link(self.link_bytes_per_s())
        self.state.active.add(self)
        self.state.fit()
        if not was_active:
            self.inventory.bind_fixed_to(self.device.device)
        self.state.streamer.upload(
            [layer for layer in self.layers if layer.name in resident and layer.resident is None]
        )
        outside = self.expect()
        # Nothing else is copied, or nobody says when they are used.
        at_once = outside if any(layer.resident is None for layer in self.layers) else self.layers
        self.state.streamer.begin_uploads(at_once)

    def expect(self) -> set[Layer]:
        """Tells the streamer which layers each root runs through; returns those that are in none. Only
        between steps."""
        outside = set(self.layers)
        for reference in self.roots:
            root = reference()
            if root is not None:
                modules = set(map(id, root.modules()))
                inside = [layer for layer in self.layers if id(layer.module()) in modules]
                outside.difference_update(inside)
                running = [layer for layer in inside if layer not in self.idle.layers]
                self.state.streamer.expect(id(root), running)
        return outside

    def begin_uploads(self) -> None:
        """Begins the copies of all residents now, for a host that will not run the model at once."""
        self.state.streamer.begin_uploads(self.layers)

    def make_plan(self, budget_bytes: int, layers: Sequence[Layer] | None = None) -> Plan:
        """The plan for `budget_bytes`, from measured times where there are any; nothing is changed. layers:
        those that steps run; None: those that they run now."""
        layers = self.running_layers if layers is None else layers
        available = max(0, budget_bytes - self.fixed_bytes - self.scratch_bytes)

        def plan_for(nbytes: int, ring_bytes: int | None) -> Plan:
            return self._plans.make(
                profile.costs(layers),
                # The ring comes in whole alignments: a budget that does not would be passed by the rest.
                budget_bytes=nbytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES,
                link_bytes_per_s=self.link_bytes_per_s(),
                ring_bytes=ring_bytes,
            )

        idle = set(self.layers).difference(layers)
        if not idle or self._ring_bytes is not None:
            return plan_for(available, self._ring_bytes)
        # Layers that are idle are fetched ahead of their steps: they, too, have to fit into the ring.
        least_ring = max(layer.payload_bytes for layer in idle)
        largest = max((layer.payload_bytes for layer in layers), default=0)
        available = max(available, least_ring, largest)  # A smaller budget is raised to the floor.
        plan = plan_for(available, None)
        if plan.ring_bytes >= least_ring:
            return plan
        if plan.ring_bytes:
            return plan_for(available, max(least_ring, largest))
        if available - least_ring < largest:
            return plan
        plan = plan_for(available - least_ring, None)
        return plan._replace(ring_bytes=plan.ring_bytes + least_ring)

    def link_bytes_per_s(self) -> float:
        steps = [step for step in self.state.streamer.timeline.finished if step.copy_s > 0]
        if not steps:
            return ASSUMED_LINK_BYTES_PER_S
        return sum(step.h2d_bytes for step in steps) / sum(step.copy_s for step in steps)

    def _place(self, layers: list[Layer]) -> None:
        """Gives `layers` the homes that the location asks for, where they do not have them yet."""
        budget = self.state.pin_budget
        placement = choose_homes(layers, self.location, self.device, budget)
        if placement.cpu or placement.disk:
            self.state.copier.use_worker(True)  # Staging is page-locked first.
            placement = choose_homes(layers, self.location, self.device, budget)
        if placement.message:
            ledger.message(f"{self.name}: {placement.message}.", "warning")
        to_lock = [layer for layer in placement.shared if not layer.home.page_locked]
        to_copy = [layer for layer in placement.cpu if layer.home.kind != "cpu"]
        to_file = [layer for layer in placement.disk if layer.home.kind != "disk"]
        left = {id(layer.home.owner) for layer in [*to_copy, *to_file] if layer.home.page_locked}
        if left:
            # Residents may have their masters in those arenas, too.
            moving = {*to_copy, *to_file}
            behind = [lay for lay in self.layers if id(lay.home.owner) in left and lay not in moving]
            to_file += [layer for layer in behind if has_file(layer)]
            to_copy += [layer for layer in behind if not has_file(layer)]
            self.device.synchronize()  # The device may still be reading what is about to be released.
        use_file(to_file)
        for owner, inside in whole_arenas(to_copy, self.layers):
            unlock_in_place(owner, inside)
        lacking = fill_arena([layer for layer in to_copy if layer.home.kind != "cpu"], self.device, None)
        if lacking:
            ledger.message(
                f"{self.name}: {lacking}; what found no place stays where it is. Close other programs, or "
                "choose Disk.",
                "warning",
            )
        self._bind_masters([*to_copy, *to_file])
        refused = None
        if self.device.can_register:
            for owner, inside in whole_arenas(to_lock, self.layers):
                refused = lock_in_place(owner, inside, self.device, budget) or refused
                to_lock = [layer for layer in to_lock if layer not in inside]
                self._bind_masters(inside)
        refused = fill_arena(to_lock, self.device, budget) or refused
        self._bind_masters(to_lock)
        if refused:
            self.state.copier.use_worker(True)
            if refused != BUDGET_USED_UP:
                budget.limit_bytes = budget.used_bytes  # Asking again, and copying for it, would be in vain.
            ledger.message(
                f"{self.name}: {refused}; what could not be page-locked is read from ordinary RAM, or from "
                "the file. Allow less page-locked memory, or choose CPU.",
                "warning",
            )

    def _bind_masters(self, layers: Iterable[Layer]) -> None:
        """Lets the modules' parameters alias the masters, each by a fresh Parameter: hosts change those that
        they are given."""
        for layer in layers:
            module = layer.module()
            if module is not None:
                for part in layer.parts:
                    master = layer.home.tensor(part)
                    module._parameters[part.name] = torch.nn.Parameter(master, requires_grad=False)

    def give_up(self, nbytes: int) -> None:
        """Drops residents, the last ones first, until `nbytes` of device memory are free, for another model;
        the fixed ones too where that is not enough. The next `rebalance` brings back what fits then. Only
        while this model does not run."""
        with self.state.turn.held():
            dropped: list[Layer] = []
            for layer in reversed(self.layers):
                if nbytes <= 0:
                    break
                if layer.resident is not None:
                    dropped.append(layer)
                    nbytes -= layer.payload_bytes
            self.state.streamer.quiesce()
            self.state.streamer.evict(dropped)
            self.budget_bytes, self.grown_bytes = None, 0
            if nbytes > 0:
                self.unload()

    def check_files(self) -> None:
        """Looks whether the files that masters may be read from are the ones that were opened; once per
        generation.

        Raises:
            GGUFError: one of them has been changed, or is gone.
        """
        from_files = (part for layer in self.layers if layer.home.kind == "disk" for part in layer.parts)
        sources = [part.source for part in from_files]
        embeddings = (reference() for reference in self.gathered)
        sources += [getattr(one.weight, "source", None) for one in embeddings if one is not None]
        for file in {source.file for source in sources if source is not None}:
            file.check_unchanged()

    def rest(self) -> None:
        """This model does not run for a while: what its layers pass through is given back, residents stay."""
        with self.state.turn.held():
            self._end_steps()
            self.adaptation.profile.close()
            self.idle.kept.abandon()
            self.kept.clear()
            if self in self.state.active:
                with self.state.changing():
                    self.state.active.discard(self)
                    self.state.fit()

    def _end_steps(self) -> None:
        """Those that were begun and never ended."""
        for key in self._root_keys:
            self.state.turn.end_step(key)

    def wake(self) -> None:
        """It runs again.

        Raises:
            torch.OutOfMemoryError: what `rest` gave back cannot be had any more.
        """
        if self.active and self not in self.state.active:
            with self.state.changing():
                self.state.active.add(self)
                self.state.fit()

    @contextlib.contextmanager
    def masters_bound(self) -> Iterator[None]:
        """Inside, all parameters are their masters, on the CPU, for a host that changes weights (a LoRA);
        what it put in their place becomes the master afterwards, and what it puts back later is
        recognised."""
        with self.state.turn.held():
            self.state.streamer.quiesce()
            self.state.copier.finish()  # It may be reading what the host replaces.
            if self.active:
                self.inventory.bind_fixed_to_masters()
            try:
                yield
            finally:
                self.idle.forget()
                changed = [layer for layer in self.layers if layer.adopt()]
                self._bind_masters(changed)
                self.state.streamer.evict([layer for layer in changed if layer.resident is not None])
                self.inventory.adopt_fixed()
                if changed:
                    self.budget_bytes = None
                if self.active:
                    self.inventory.bind_fixed_to(self.device.device)

    def unload(self) -> None:
        """Drops every device copy. Nothing is moved: the masters have been there all the time."""
        with self.state.changing():
            self.adaptation.profile.close()
            self.idle.kept.abandon()
            self.kept.clear()
            self.state.streamer.quiesce()
            self.state.streamer.evict([layer for layer in self.layers if layer.resident is not None])
            if self.plan is not None:
                self.inventory.bind_fixed_to_masters()
            self.plan, self.grown_bytes = None, 0
            for key in self._root_keys:
                self.state.streamer.forget(key)
            self.state.active.discard(self)
            self.state.fit()

    def release(self) -> None:
        """The last of it: the model is gone, or is given back to its host."""
        ledger.unregister(self)
        self._end_steps()
        self.unload()
        self.idle.forget()
        self.state.copier.finish()  # Whoever has the masters now may free them.

    def detach(self) -> None:
        """Gives the module back as it was: its own forwards, its parameters on the CPU (still packed), those
        that came from a file in the file again, so that RAM and page-locks are given back. Idempotent."""
        with self.state.turn.held():
            self.release()
            self._bind_masters(leave_arenas(self.layers))
            self.modules.remove()
            for reference, key in self._trainable:
                module = reference()
                parameter = None if module is None else module._parameters.get(key)
                if parameter is not None:
                    # A model that was made in inference mode (Forge's are) lets nobody else change that.
                    with torch.inference_mode(parameter.is_inference()):
                        parameter.requires_grad_(True)
            self._finalizer.detach()

    # -------------------------------------------------------------------------------------------------- steps
    def begin_step(self, root: torch.nn.Module, work: Work | None = None, asked: Asked | None = None) -> None:
        """The forward of `root` (the module, or a part of it that runs by itself) begins; `work`: by
        which its time is known; `asked`: as from `IdleLayers.asked`, None: nothing is known of it."""
        work = work or Work(id(root), ())
        self.state.turn.begin_step(id(root))  # `ModuleHooks` ends it, however the forward ends.
        self.used_at = time.time()
        self._ran_in = threading.get_ident()
        self.state.enter()
        self.idle.before_step(work, asked)
        measured = self.adaptation.before_step(work)
        self.run.count_forward()
        self.state.streamer.begin_step(id(root), wrap=self.run.goes_on, measured=work if measured else None)

    def abandon_step(self, root: torch.nn.Module) -> None:
        """The forward of `root` raised."""
        self.state.streamer.abandon_step(id(root))
        self.idle.kept.abandon()
        self.adaptation.profile.forget(id(root))
        self.state.turn.end_step(id(root))  # No hook is called after what is no Exception, such as Ctrl-C.

    def end_step(self, root: torch.nn.Module) -> None:
        """The forward of `root` is over."""
        traced = self.state.streamer.end_step(id(root))
        self.idle.kept.end()
        self.adaptation.after_step()
        if traced is not None:
            # Layers of other roots stay where they are, and those of other models have no place here. A new
            # list: the page may be walking along the old one.
            places = set(self.layers).intersection(traced)
            ordered = (layer for layer in traced if layer in places)
            self.layers = [next(ordered) if layer in places else layer for layer in self.layers]

    def acquire(self, layer: Layer) -> AnyLease:
        """The weights of `layer` on the device; see `Streamer.acquire`."""
        return self.state.streamer.acquire(layer)


def _module_gone(attachment: Attachment) -> None:
    attachment.state.gone.append(attachment)
    attachment.state.sweep()


def is_weighted(module: torch.nn.Module) -> bool:
    """Whether it is a leaf of torch's own kinds whose weight is a matrix or a kernel."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.dim() >= 2
        and not module._modules
        and isinstance(module, (torch.nn.Linear, torch.nn.modules.conv._ConvNd))
    )


READ_BY_PARENTS = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer)
"""Modules of torch's that compute with the weights of the modules in them, and do not call those."""


def _called_layers(model: torch.nn.Module) -> Callable[[torch.nn.Module], bool]:
    """What of `model` can be swapped unless the host knows better: what is weighted, and computes itself."""
    parents = (module for module in model.modules() if isinstance(module, READ_BY_PARENTS))
    read = {id(module) for parent in parents for module in parent.modules()}
    return lambda module: is_weighted(module) and id(module) not in read


def attach(
    module: torch.nn.Module,
    *,
    device: torch.device | str,
    location: Location = "auto",
    budget_bytes: int | None = None,
    pin_budget_bytes: int | None = None,
    ring_bytes: int | None = None,
    arithmetic: Arithmetic = "exact",
    compute_dtype: torch.dtype | None = None,
    name: str | None = None,
    conditioning: Conditioning | None = None,
) -> Attachment:
    """Runs `module` on `device` with weights that need not fit there.

    Args:
        module: its parameters on the CPU, packed (`PackedTensor`) or plain.
        location: where the masters live; see `home`.
        budget_bytes: device bytes for weights: fixed ones, residents, ring and scratch. None: what is
            free, less an eighth.
        pin_budget_bytes: page-locked bytes, staging included, for all models of this device. None: 60 %
            of RAM (Windows: 40 %).
        ring_bytes: None: chosen by the planner.
        arithmetic: "exact", or "like Forge" to reproduce its rounding.
        compute_dtype: what layers compute in, for sizing the scratch and for "like Forge". None: what
            they are given.

    While it is attached, its weights are not to be written, moved or replaced (`to`, `load_state_dict`, an
    optimizer): what computes are copies of them. Buffers may change.

    Raises:
        TypeError: `module` is none, `compute_dtype` is no torch.dtype, or a number of bytes is none.
        ValueError: an unknown location, arithmetic or device; a number of bytes below zero; parameters that
            are on a device, or on "meta", where they have no values; a module that is attached already, or a
            part of which is.
        torch.OutOfMemoryError: the device has no room for fixed weights, scratch and the largest layer.
    """
    if location not in LOCATIONS:
        raise ValueError(f"location is {location!r}; choose one of {', '.join(LOCATIONS)}")
    if arithmetic not in get_args(Arithmetic):
        raise ValueError(f"arithmetic is {arithmetic!r}; choose one of {', '.join(get_args(Arithmetic))}")
    if not isinstance(compute_dtype, torch.dtype | None):
        raise TypeError(f"compute_dtype is {compute_dtype!r}; give a torch.dtype, such as torch.bfloat16")
    if compute_dtype is not None and not compute_dtype.is_floating_point:
        raise ValueError(f"compute_dtype is {compute_dtype}; give one of floating-point numbers")
    _check_bytes("budget_bytes", budget_bytes)
    _check_bytes("pin_budget_bytes", pin_budget_bytes)
    _check_bytes("ring_bytes", ring_bytes)
    _check_module(module)
    attachment = Attachment(
        module,
        _usable(device),
        name=name or type(module).__name__,
        location=location,
        pin_budget_bytes=pin_budget_bytes,
        ring_bytes=ring_bytes,
        arithmetic=arithmetic,
        compute_dtype=compute_dtype,
        can_swap=_called_layers(module),
        roots=None,
        conditioning=conditioning,
    )
    attachment.modules.replace_forwards(attachment)
    attachment.modules.keep_outputs(attachment)
    try:
        attachment.rebalance(budget_bytes)
    except BaseException:
        attachment.detach()
        raise
    return attachment


def _check_bytes(argument: str, nbytes: object) -> None:
    if not isinstance(nbytes, Integral | None):
        raise TypeError(f"{argument} is {nbytes!r}; give a number of bytes")
    if nbytes is not None and nbytes < 0:
        raise ValueError(f"{argument} is {nbytes}; give a number of bytes, or 0")


def _check_module(module: object) -> None:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module is {type(module).__name__}; give a torch.nn.Module")
    for one in module.modules():
        if is_attached(one):
            raise ValueError(f"{type(one).__name__} is attached already: detach it first")
    for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in tensors:
            if tensor.device.type == "meta":
                raise ValueError(f"{kind} {name} is on meta: it has no values, load them first")
            if kind == "parameter" and tensor.device.type != "cpu":
                raise ValueError(
                    f"{kind} {name} is on {tensor.device}: weights are swapped from RAM, so move the module "
                    "there first, with to('cpu')"
                )


def _usable(device: torch.device | str) -> Device:
    """
    Raises:
        ValueError: there is none, or it cannot compute.
    """
    try:
        if torch.device(device).type == "meta":
            raise ValueError("it has no values")
        return device_of(device)
    except (AssertionError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"device is {str(device)!r}: {str(error).partition(chr(10))[0]}") from None


@contextlib.contextmanager
def attached(module: torch.nn.Module, **options: Any) -> Iterator[Attachment]:
    """`attach`, undone at the end of the block."""
    attachment = attach(module, **options)
    try:
        yield attachment
    finally:
        attachment.detach()

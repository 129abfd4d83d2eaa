"""The layers that the present steps of a model do without, since their outputs are kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lib_qswap.swap.attachment_part import AttachmentPart
from lib_qswap.swap.kept_outputs import KeptOutputs
from lib_qswap.swap.look_ahead import LookAhead
from lib_qswap.swap.profile import Work

if TYPE_CHECKING:
    from lib_qswap.swap.conditioning import Asked, Conditioning
    from lib_qswap.swap.layer import Layer
    from lib_qswap.swap.manager import Attachment


class IdleLayers(AttachmentPart):
    """Which layers of one attachment are not run, from step to step.

    Attributes:
        conditioning: what some layers depend on alone; None: nothing is known.
        kept: the outputs of those.
        ahead: what computes them before their steps.
        allowed: whether the user wants any to be kept.
        added: what the host adds to a module's weight at the moment, for the key; None: nothing that it does
            not say.
        layers: those that are idle now.
        spared_bytes: what fewer bytes travel in a step than with them; before another plan is made, what they
            swapped themselves.
    """

    def __init__(self, model: Attachment, conditioning: Conditioning | None) -> None:
        super().__init__(model)
        self.conditioning = conditioning
        self.allowed = True
        self.added: Callable[[torch.nn.Module], Hashable] | None = None
        self._run_number = 0
        self.layers: frozenset[Layer] = frozenset()
        self._swapped_before = 0
        covered = [layer for layer in model.layers if conditioning is not None and conditioning.covers(layer)]
        self.kept = KeptOutputs(covered, model.device.device)
        self.ahead = LookAhead(model, conditioning)

    @property
    def spared_bytes(self) -> int:
        model = self._model
        return max(0, self._swapped_before - model.swapped_bytes) if self.layers and model.active else 0

    def asked(self, root: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Asked | None:
        """What a forward of `root` with these arguments gives `before_step`. It is not asked for where all
        layers are resident: that takes no time to be saved."""
        model = self._model
        if (
            self.conditioning is None
            or not self.allowed
            or not self.kept.layers
            or all(layer.resident is not None for layer in model.layers)
        ):
            return None
        asked = self.conditioning.asked(root, args, kwargs, model.device.device)
        if asked is None or self.added is None:
            return asked
        modules = ((layer.name, layer.module()) for layer in self.kept.layers)
        added = ((name, self.added(module)) for name, module in modules if module is not None)
        rest = asked.key.rest, frozenset(one for one in added if one[1])
        return asked._replace(key=asked.key._replace(rest=rest))

    def before_step(self, work: Work, asked: Asked | None) -> None:
        """A forward begins; what follows from its conditioning happens to the model's order and plan."""
        model = self._model
        # Before they are measured, all layers have to run.
        measured = model.adaptation.profile.has_measured(work) or not model.device.has_clock
        if self._run_number != model.run.number:
            self._run_number = model.run.number
            self.kept.begin_run()
        if asked is not None:
            self.ahead.note(asked)
            if measured:
                self.ahead.prepare(asked, work)
        served = self.kept.begin(None if asked is None else asked.key, may_serve=measured)
        layers = self.kept.layers if served else frozenset()
        if layers == self.layers:
            return
        if served:
            self._swapped_before = model.swapped_bytes
        come_back = self.layers - layers
        self.layers = layers
        if model.plan is None:
            return
        model.adaptation.profile.reconsider()  # Others are worth being resident.
        largest = max((layer.payload_bytes for layer in come_back if layer.resident is None), default=0)
        if largest > model.plan.ring_bytes and model.budget_bytes is not None:
            model.fit_into(model.budget_bytes)
        else:
            model.expect()

    def forget(self) -> None:
        """What is kept is not right any more, or not wanted; all layers run again after the next
        `rebalance`."""
        self.kept.clear()
        self.layers = frozenset()

"""The outputs of all steps of an image at once, for layers that depend on the conditioning alone.

With a new prompt nothing is kept for its steps. Their time steps are those of the image before, though, as
long as the number of steps is the same: so what these layers compute for all steps to come is computed before
the first one, and their weights travel once an image instead of once a step.

It is the network's own forward that computes it, in a *rehearsal*: with a batch for each step, the least
picture and text that it takes, and zeros for what all other layers compute. Each step's outputs come from a
call of their own, with the same shapes as in the step itself, so that they have the same bits. That they do
is not taken for granted: what an earlier step has computed is computed again in the first rehearsal, and
where it differs there is no other one. Where the time steps are others than expected, nothing is served.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lib_qswap.swap import ledger, profile
from lib_qswap.swap.attachment_part import AttachmentPart
from lib_qswap.swap.conditioning import Asked, Conditioning, Key

if TYPE_CHECKING:
    from lib_qswap.swap.layer import Layer
    from lib_qswap.swap.manager import Attachment
    from lib_qswap.swap.streamer import Streamer

MOST_AHEAD = 128
"""Steps that are computed ahead at once."""

KEPT_SCHEDULES = 1024
"""Time steps of which it is known what follows them."""


class LookAhead(AttachmentPart):
    """What one attachment knows of the steps to come."""

    def __init__(self, model: Attachment, conditioning: Conditioning | None) -> None:
        super().__init__(model)
        self._conditioning = conditioning
        self._next: dict[Hashable, Hashable] = {}
        self._last: tuple[Hashable, Hashable] | None = None
        self._works = conditioning is not None and conditioning.least is not None
        self._checked: set[Hashable] = set()

    def note(self, key: Key) -> None:
        """A step of `key` begins: its time step follows the one before it in every run of as many steps."""
        run = self._model.run
        situation = run.steps, key.description
        here = (situation, key.time)
        if self._last is not None:
            number, before = self._last
            if number == run.number and before != here:
                if len(self._next) >= KEPT_SCHEDULES:
                    self._next.clear()
                self._next[before] = here
        self._last = run.number, here

    def _coming(self, key: Key) -> list[Key]:
        """The steps of this run from `key` on, as far as they are known."""
        here: Any = ((self._model.run.steps, key.description), key.time)
        found = [here]
        while len(found) < MOST_AHEAD:
            here = self._next.get(here)
            if here is None or here in found:
                break
            found.append(here)
        return [key.at(time) for _, time in found]

    def prepare(self, asked: Asked) -> None:
        """Before a step that was not seen before: keeps its outputs, and those of the steps that follow it,
        where that pays."""
        model = self._model
        kept = model.idle.kept
        key = asked.key
        if not self._works or model.run.steps is None or key in kept:
            return
        assert self._conditioning is not None
        coming = [one for one in self._coming(key) if one not in kept][: kept.most_steps]
        if len(coming) < 2 or not self._conditioning.is_own(asked.network) or not self._pays(len(coming)):
            return
        check = kept.like(key) if key.rest not in self._checked else None
        if key.rest not in self._checked and check is None:
            return
        try:
            outputs = self._rehearse(asked, [*coming, *([check] if check is not None else [])])
        except torch.cuda.OutOfMemoryError:  # the name that torch 2.3 has as well, for every device
            model.device.empty_cache()
            return
        except Exception as error:
            # What can be wrong with a file is said by the step itself, which reads it, too.
            self._give_up(f"{type(error).__name__}: {error}")
            return
        if check is not None:
            before = kept.outputs_of(check)
            if any(not _same_bits(before[layer], output[-1]) for layer, output in outputs.items()):
                self._give_up("what it gives differs from what a step gave")
                return
            self._checked.add(key.rest)
        kept.store_ahead(coming, outputs)

    def _give_up(self, reason: str) -> None:
        self._works = False
        ledger.message(
            f"{self._model.name}: what depends on the prompt alone is computed step by step, not ahead "
            f"({reason})."
        )

    def _pays(self, steps: int) -> bool:
        """Whether so many steps wait less, without these layers, than their weights' transfer takes. What
        they compute is the same ahead and in the steps."""
        model = self._model
        assert model.plan is not None
        assert model.budget_bytes is not None
        covered = model.idle.kept.layers
        fetched = [layer.payload_bytes for layer in covered if layer.resident is None]
        if max(fetched, default=0) > model.plan.ring_bytes:
            return False
        others = [layer for layer in model.layers if layer not in covered]
        whole, without = (
            model.make_plan(model.budget_bytes, layers).step_s for layers in (model.layers, others)
        )
        computing = sum(cost.compute_s for cost in profile.costs(list(covered)))
        return steps * (whole - without - computing) > sum(fetched) / model.link_bytes_per_s()

    def _rehearse(self, asked: Asked, keys: Sequence[Key]) -> dict[Layer, torch.Tensor]:
        """What each layer gives for each of `keys`, on the CPU, (keys, ...).

        Raises:
            RuntimeError, TypeError, ValueError: the network cannot be run like this.
        """
        model, network = self._model, asked.network
        assert self._conditioning is not None
        covered = model.idle.kept.layers
        arguments = self._conditioning.arguments_of(asked, keys, model.device.device)
        batch = self._conditioning.batch(asked)
        streamer, root = model.state.streamer, (id(network), "ahead")
        rehearsal = Rehearsal(len(keys), batch, streamer)
        streamer.expect(root, [layer for layer in model.layers if layer in covered])
        streamer.begin_step(root, wrap=False)
        try:
            with _zeros_from([layer for layer in model.layers if layer not in covered]):
                model.idle.kept.rehearsal = rehearsal
                type(network).forward(network, **arguments)
            streamer.end_step(root)
        except BaseException:
            streamer.abandon_step(root)
            raise
        finally:
            model.idle.kept.rehearsal = None
            streamer.forget(root)
            model.expect()
        if rehearsal.outputs.keys() != covered:
            raise RuntimeError("not all layers were run")
        return rehearsal.outputs


class Rehearsal:
    """A forward in which every layer that is run gets what it gets in `count` steps, one `batch` behind the
    other."""

    def __init__(self, count: int, batch: int, streamer: Streamer) -> None:
        self.outputs: dict[Layer, torch.Tensor] = {}
        self._count, self._batch, self._streamer = count, batch, streamer

    def run(
        self, layer: Layer, call: Callable[..., torch.Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """Runs `layer` once for each step."""
        (inputs,) = (*args, *kwargs.values())
        if layer in self.outputs or len(inputs) != self._count * self._batch:
            raise RuntimeError(f"{layer.name} does not run once for each step")
        with self._streamer.held(layer):
            found = [call(one) for one in inputs.split(self._batch)]
        # On the device, those of all layers would be outside of the budget.
        self.outputs[layer] = torch.stack(found).cpu()
        return torch.cat(found)


@contextlib.contextmanager
def _zeros_from(layers: Sequence[Layer]) -> Iterator[None]:
    """Inside, these layers need no weights: their outputs are zeros. Kernels of convolutions are small in
    the networks that this is for, and run."""
    replaced = []
    try:
        for layer in layers:
            module = layer.module()
            weight = None if module is None else module._parameters.get("weight")
            if module is not None and weight is not None and weight.dim() == 2:
                replaced.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = _Zeros(weight.shape[0])
        yield
    finally:
        for module, forward in replaced:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


class _Zeros:
    def __init__(self, width: int) -> None:
        self._width = width

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros((*x.shape[:-1], self._width))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = (one.contiguous().view(-1).view(torch.uint8) for one in (a, b))
    return torch.equal(a, b)

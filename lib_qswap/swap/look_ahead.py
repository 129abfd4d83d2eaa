"""The outputs of all steps of an image at once, for layers that depend on the conditioning alone.

With a new prompt nothing is kept for its steps. Their time steps are known, though: the host has told them,
or they are those of the image before, as long as the number of steps is the same. So what these layers
compute for all steps to come is computed before the first one, and their weights travel once an image instead
of once a step.

It is the network's own forward that computes it, in a *rehearsal*: with a batch for each step, the least
picture and text that it takes, and zeros for what all other layers compute. Each step's outputs come from a
call of their own, with the same shapes as in the step itself, so that they have the same bits. That they do
is not taken for granted: what an earlier step has computed is computed again in the first rehearsal, and
where it differs there is no other one. Where the time steps are others than expected, nothing is served.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lib_qswap.swap import ledger, profile
from lib_qswap.swap.attachment_part import AttachmentPart
from lib_qswap.swap.conditioning import Asked, Conditioning, Key, Value, value_of

if TYPE_CHECKING:
    from lib_qswap.swap.layer import Layer
    from lib_qswap.swap.manager import Attachment
    from lib_qswap.swap.profile import Work
    from lib_qswap.swap.streamer import Streamer

MOST_AHEAD = 128
"""Steps that are computed ahead at once."""

KEPT_LINKS = 1024
"""Time steps of which it is known what follows them."""

HOST_S = 100e-6
"""What one output of one layer takes the host, about."""


class _Link(NamedTuple):
    """What followed a time step the last time, and how often in a row; where something else had followed
    before, it is no guess until it has come again."""

    next: _Place
    times: int


class _Place(NamedTuple):
    """A time step of a run. situation: of runs whose time steps are the same: their number of steps, and
    the shapes of what their steps are asked for."""

    situation: Hashable
    time: Value


class LookAhead(AttachmentPart):
    """What one attachment knows of the steps to come."""

    def __init__(self, model: Attachment, conditioning: Conditioning | None) -> None:
        super().__init__(model)
        self._conditioning = conditioning
        self._links: dict[_Place, _Link] = {}
        self._last: tuple[int, _Place] | None = None
        self._works = conditioning is not None and conditioning.least is not None
        self._checked: set[Hashable] = set()
        self._told: tuple[Hashable, list[Value]] = (None, [])
        self._not_in_run: int | None = None

    def note(self, asked: Asked) -> None:
        """A step begins: its time step follows the one before it in every run like this."""
        number, here = self._model.run.number, self._place(asked)
        if self._last is not None:
            of_run, before = self._last
            if of_run == number and before != here:
                if len(self._links) >= KEPT_LINKS:
                    self._links.clear()
                known = self._links.get(before)
                times = 1 if known is None else known.times + 1 if known.next == here else 0
                self._links[before] = _Link(here, times)
        self._last = number, here

    def _place(self, asked: Asked) -> _Place:
        shapes = tuple(value.shape for value in asked.named.values() if isinstance(value, torch.Tensor))
        return _Place((self._model.run.steps, asked.key.description, shapes), asked.key.time)

    def _coming(self, asked: Asked) -> list[Key]:
        """The steps of this run from this one on, as far as they are known."""
        told = self._told_times(asked.key.time)
        if asked.key.time in told:
            return [asked.key.at(time) for time in told[told.index(asked.key.time) :][:MOST_AHEAD]]
        found = [self._place(asked)]
        while len(found) < MOST_AHEAD:
            link = self._links.get(found[-1])
            if link is None or not link.times or link.next in found:
                break
            found.append(link.next)
        return [asked.key.at(place.time) for place in found]

    def _told_times(self, like: Value) -> list[Value]:
        """Those that the host has told for this run, each for as many pictures as `like` is for."""
        run = self._model.run
        if run.times is None or isinstance(like, str):
            return []
        dtype, shape, _ = like
        if self._told[0] != (run.number, dtype, shape):
            times = [value_of(time.expand(shape)) for time in run.times.to(dtype)]
            self._told = (run.number, dtype, shape), times
        return self._told[1]

    def prepare(self, asked: Asked, work: Work) -> None:
        """Before a step that was not seen before: keeps its outputs, and those of the steps that follow it,
        where that pays. What goes wrong is no matter of the step's."""
        model = self._model
        run, kept = model.run, model.idle.kept
        if (
            not self._works
            or run.steps is None
            or self._not_in_run == run.number
            or asked.key in kept
            or model.plan is None
            or model.budget_bytes is None
        ):
            return
        try:
            self._prepare(asked, work)
        except torch.cuda.OutOfMemoryError:  # the name that torch 2.3 has as well, for every device
            self._not_in_run = run.number
            model.device.empty_cache()
        except Exception as error:
            # What can be wrong with a file is said by the step itself, which reads it, too.
            self._give_up(f"{type(error).__name__}: {error}")

    def _prepare(self, asked: Asked, work: Work) -> None:
        model = self._model
        kept, key = model.idle.kept, asked.key
        assert self._conditioning is not None
        coming = [one for one in dict.fromkeys(self._coming(asked)) if one not in kept][: kept.most_steps]
        if len(coming) < 2 or not self._conditioning.is_own(asked.network):
            return
        check = kept.like(key) if key.rest not in self._checked else None
        if (key.rest not in self._checked and check is None) or not self._take_times_of(work):
            return
        if self._pays(len(coming)):
            outputs = self._rehearse(asked, [*coming, *([check] if check is not None else [])])
            if check is not None:
                before = kept.outputs_of(check)
                if any(not _same_bits(before[layer], output[-1]) for layer, output in outputs.items()):
                    raise ValueError("what it gives differs from what a step gave")
                self._checked.add(key.rest)
            kept.store_ahead(coming, outputs)
        if key not in kept:
            self._not_in_run = model.run.number

    def _take_times_of(self, work: Work) -> bool:
        """Lets plans be made from what was measured for `work`; returns whether anything was."""
        model = self._model
        times = model.adaptation.profile
        if not model.device.has_clock or times.is_in_use(work):
            return True
        model.state.streamer.timeline.collect()
        known = times.use(work, model.layers)
        times.reconsider()  # The step looks for its plan as it would have without this.
        return known

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
        taken_s = sum(fetched) / model.link_bytes_per_s() + steps * len(covered) * HOST_S
        whole_s = model.make_plan(model.budget_bytes, model.layers).step_s
        computing_s = sum(cost.compute_s for cost in profile.costs(model.layers))
        if steps * (whole_s - computing_s) <= taken_s:  # Nothing waits that long: the other plan is spared.
            return False
        without_s = model.make_plan(model.budget_bytes, others).step_s
        ahead_s = sum(cost.compute_s for cost in profile.costs(list(covered)))
        return steps * (whole_s - without_s - ahead_s) > taken_s

    def _rehearse(self, asked: Asked, keys: Sequence[Key]) -> dict[Layer, torch.Tensor]:
        """What each layer gives for each of `keys`, on the CPU, (keys, ...).

        Raises:
            RuntimeError, TypeError, ValueError: the network cannot be run like this.
        """
        model, network = self._model, asked.network
        assert self._conditioning is not None
        covered = model.idle.kept.layers
        arguments = self._conditioning.arguments_of(asked, keys)
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

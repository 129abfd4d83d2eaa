"""A model's plan and residents follow what its steps take: measured times, and memory beside the weights."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch

from lib_qswap.swap import ledger, profile
from lib_qswap.swap.attachment_part import AttachmentPart
from lib_qswap.swap.profile import KEPT_WORKS, Need, Profile, Work
from lib_qswap.swap.timeline import KEPT_STEPS

if TYPE_CHECKING:
    from lib_qswap.swap.manager import Attachment

RELIEF_BYTES = 256 << 20
"""The least that residents give back where the computation ran out of memory."""

CROWDED_STEPS = 2
"""In so many of a model's forwards in a row the allocator has to try again before residents give way, and
from then on in every one until there was one without: after a change it may have to once."""
CROWDED_BYTES = 128 << 20
CROWDED_SHARE = 16
"""What they give back then, at least, and the budget over this."""

CHANGED_LINK = 0.1
"""By this share copies have to be faster or slower than the plan was made for before another one is looked
for. The link of a card that saved power is slow at first, a shared one changes, and so does the rate at which
a file is read."""

LOOK_AT_LINK_STEPS = KEPT_STEPS
"""From one look at it to the next; what the link is then taken to be is the mean of as many steps."""

NEED_MARGIN = 10
NEED_MARGIN_BYTES = (512 if sys.platform == "win32" else 64) << 20
"""Left free beside what a step was seen to need: a tenth of it, and this. Windows moves memory of programs to
RAM, silently, before the card is full."""


class Adaptation(AttachmentPart):
    """What the steps of one attachment have shown, and what follows from it.

    Attributes:
        profile: what was measured.
    """

    def __init__(self, model: Attachment) -> None:
        super().__init__(model)
        self.profile = Profile(model.device)
        self._postponed = False
        self._turns: dict[Hashable, tuple[Work, int]] = {}
        self._lasted: dict[Work, int] = {}
        self._doubted = False
        self._planned_link: float | None = None
        self._steps_with_link, self._times_changed, self._times_to_follow = 0, 0, 2
        self._retries: int | None = None
        self._crowded_steps = 0

    def before_step(self, work: Work) -> bool:
        """A forward begins, of this `work`. Returns whether it is measured."""
        model = self._model
        if self._postponed and model.run.index <= 1:  # Of another run, which may be longer.
            self.profile.reconsider()
            self._postponed = False
        self.profile.close()
        forwards = self._count_turn(work)
        measured = model.device.has_clock and not self.profile.has_measured(work)
        if measured:
            self._take_back()  # What this work needs is not known.
            self.profile.begin(work, model.layers)
        elif model.device.has_clock and (
            not self.profile.is_in_use(work)
            or self._link_has_changed()
            or (self._doubted and forwards.bit_count() == 1)
        ):
            self._replan(work)
        if not self._yield_to_others(work):
            self._make_room()
        self._retries = model.device.allocation_retries()
        return measured

    def after_step(self) -> None:
        """The forward that began last is over."""
        if self._retries is not None:
            crowded = self._model.device.allocation_retries() > self._retries
            self._crowded_steps = self._crowded_steps + 1 if crowded else 0
        self._retries = None

    def relieve(self, root: torch.nn.Module) -> bool:
        """The device ran out of memory in the forward of `root`: half of the residents are given back, then
        all of them, then those of other models. Returns whether there was anything to give, so that the
        forward can be done again."""
        model = self._model
        self._retries = None  # This is what follows from them.
        self.profile.forget(id(root))
        others = [one for one in ledger.attachments() if one.device is model.device and one is not model]
        resident, floor = model.resident_bytes, model.floor_bytes
        if model.budget_bytes is not None and resident and model.budget_bytes > floor:
            few = resident <= RELIEF_BYTES
            freed = resident if few else max(resident // 2, RELIEF_BYTES)
            budget_bytes = max(floor, min(model.budget_bytes, model.whole_bytes) - freed)
            ledger.message(
                f"{model.name}: the computation ran out of device memory and is done again with "
                f"{freed / 2**20:.0f} MB less of resident weights."
            )
            asked_bytes = model.budget_bytes - model.grown_bytes
            model.grown_bytes = max(0, budget_bytes - asked_bytes)
            # Measured, the step may turn out to leave some of it.
            model.spare_bytes += asked_bytes - (budget_bytes - model.grown_bytes)
            model.fit_into(budget_bytes)
        elif freed := sum(one.resident_bytes for one in others):
            for one in others:
                one.give_up(one.resident_bytes)
            ledger.message(
                f"{model.name}: the computation ran out of device memory and is done again without the "
                f"{freed / 2**20:.0f} MB of resident weights of other models."
            )
        else:
            return False
        model.device.empty_cache()
        model.state.streamer.begin_step(id(root), wrap=model.run.goes_on)
        model.idle.kept.restart()
        return True

    def _take_back(self) -> None:
        """What was given on top of the budget."""
        model = self._model
        if model.budget_bytes is not None and model.grown_bytes > 0:
            budget_bytes = model.budget_bytes - model.grown_bytes
            model.grown_bytes = 0
            model.fit_into(budget_bytes)

    def _room_bytes(self, need: Need) -> int:
        """Free device bytes beside what a step needs; negative where it lacks some."""
        free, _ = self._model.device.memory_bytes()
        return free - need.nbytes - need.nbytes // NEED_MARGIN - NEED_MARGIN_BYTES

    def _yield_to_others(self, work: Work) -> bool:
        """Gives residents back where another program, or something else in this one, took the memory that
        this step needs. Returns whether it did."""
        model = self._model
        if model.budget_bytes is None or not model.resident_bytes:
            return False
        need = self.profile.need(work)
        if need is None or not need.is_exact:
            return False
        room = self._room_bytes(need)
        if room >= -NEED_MARGIN_BYTES:
            return False
        return self.give_back(-room, "device memory is short, and")

    def _make_room(self) -> None:
        """Gives residents back where the allocator waits for the device in every step because its free memory
        is in pieces: on a full card a step then takes as long as its copies and its computation together."""
        model = self._model
        left = model.run.steps_left  # What a change costs has to come back in these.
        if self._crowded_steps < CROWDED_STEPS or model.budget_bytes is None or left in (0, 1):
            return
        had = min(model.budget_bytes, model.whole_bytes)
        freed = max(CROWDED_BYTES, had // CROWDED_SHARE)
        if self.give_back(freed, "steps wait for device memory:"):
            self._crowded_steps = CROWDED_STEPS - 1
            # It is not lent again, nor asked for with the next image.
            crowded = had - model.budget_bytes
            model.crowded_bytes += crowded
            model.spare_bytes = max(0, model.spare_bytes - crowded)

    def give_back(self, nbytes: int, reason: str) -> bool:
        """Lowers the budget so that `nbytes` less are used of it, as far as there are residents; between two
        steps, also of a run that goes on. Returns whether there were any."""
        model = self._model
        with model.state.turn.held():
            return self._give_back(nbytes, reason)

    def _give_back(self, nbytes: int, reason: str) -> bool:
        model = self._model
        if model.budget_bytes is None or not model.resident_bytes:
            return False
        had = min(model.budget_bytes, model.whole_bytes)  # What a budget has beyond is used by nobody.
        budget_bytes = max(model.floor_bytes, had - nbytes)
        if budget_bytes >= had:
            return False
        ledger.message(
            f"{model.name}: {reason} residents are given back for the computation: "
            f"{budget_bytes / 2**20:.0f} MB of weights are left on it."
        )
        model.grown_bytes = max(0, model.grown_bytes + budget_bytes - model.budget_bytes)
        model.fit_into(budget_bytes)
        model.device.empty_cache()
        return True

    def _link_has_changed(self) -> bool:
        """Whether copies are faster or slower than the plan was made for: in two steps some steps apart, and
        in twice as many each time, since what changes all the time is nothing to follow."""
        self._steps_with_link += 1
        if self._planned_link is None or self._steps_with_link < LOOK_AT_LINK_STEPS:
            return False
        self._steps_with_link = 0
        timeline = self._model.state.streamer.timeline
        timeline.collect()
        step = timeline.last()
        if step is None or not step.copy_s:
            return False
        change = abs(step.h2d_bytes / step.copy_s - self._planned_link)
        self._times_changed = self._times_changed + 1 if change > CHANGED_LINK * self._planned_link else 0
        if self._times_changed < self._times_to_follow:
            return False
        self._times_to_follow *= 2
        return True

    def _count_turn(self, work: Work) -> int:
        """A forward of `work` begins: which one of it in a row."""
        before, forwards = self._turns.get(work.root, (work, 0))
        if before != work:
            if len(self._lasted) == KEPT_WORKS:
                self._lasted.clear()
            # One that was broken off is not what is to be expected from now on.
            self._lasted[before] = max(forwards, self._lasted.get(before, 0) // 2)
            forwards = 0
        self._turns[work.root] = work, forwards + 1
        return forwards + 1

    def _forwards_left(self, work: Work) -> int | None:
        """How many forwards of `work` may come before another work does, or the run ends: as many as last
        time, or as there have been now; None: not known. Where works take turns in every step (tiles in
        batches, and a rest), a plan for each would move residents to and fro."""
        left = self._model.run.steps_left
        if work not in self._lasted:
            return left
        forwards = self._turns[work.root][1]
        expected = max(self._lasted[work] - forwards + 1, forwards)
        return expected if left is None else min(expected, left)

    def _stays(self, work: Work, grown_bytes: int) -> bool:
        """Whether residents in `grown_bytes` may stay when another work of the same root has its turn."""
        others = [one for one in self._lasted if one.root == work.root and one != work]
        return grown_bytes > self._model.grown_bytes and all(
            self._growth_for(one) >= grown_bytes for one in others
        )

    def _replan(self, work: Work) -> None:
        """Another plan from what was measured for `work`, where it pays."""
        model = self._model
        timeline = model.state.streamer.timeline
        timeline.collect()
        if model.plan is None or model.budget_bytes is None:
            return
        if not self.profile.use(work, model.layers):
            # The device has not come to their end yet: at the next step. Or nobody has waited for it.
            if not timeline.is_waiting_for(work):
                self.profile.measure_again(work)
            return
        self._planned_link = model.link_bytes_per_s()
        self._steps_with_link = self._times_changed = 0
        model.state.streamer.use_link(self._planned_link)
        grown_bytes = self._growth_for(work)
        budget_bytes = model.budget_bytes - model.grown_bytes + grown_bytes
        plan = model.make_plan(budget_bytes)
        gain = profile.gain(plan, model.plan, model.running_layers, self._planned_link)
        self._doubted = False
        if gain is None:
            return
        stays = self._stays(work, grown_bytes)
        if gain.pays_within(model.run.steps_left if stays else self._forwards_left(work)):
            model.grown_bytes = grown_bytes
            model.fit_into(budget_bytes)
        else:
            self._postponed = True
            self._doubted = True  # The work may last longer than it has before.

    def _growth_for(self, work: Work) -> int:
        """How much of what was left beside the budget steps of `work` do not need."""
        model, need = self._model, self.profile.need(work)
        if need is None or model.asked_bytes is None:
            return 0
        # What was given back for good is not lent again: it is missing in the budget that is asked for.
        lacking = model.whole_bytes - model.asked_bytes - model.crowded_bytes
        room = self._room_bytes(need) + model.grown_bytes - model.crowded_bytes
        return max(0, min(model.spare_bytes, room, lacking))

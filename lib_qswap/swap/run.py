"""Which step of how many a run is at."""

from __future__ import annotations

import torch


class Run:
    """The steps of one generation, counted by forwards unless the host counts them itself.

    Attributes:
        steps: of the run; None: not known.
        index: of the step that began last, from 1; 0 before the first one.
        number: of runs so far that were begun, or whose steps the host has counted.
        times: fp32 (steps,) on the CPU, what the network is given as its time step in each; None: not known.
            Nothing wrong follows from others.
    """

    def __init__(self) -> None:
        self.steps: int | None = None
        self.times: torch.Tensor | None = None
        self.index = 0
        self.number = 0
        self._host_counts = False

    def begin(self, steps: int | None, times: torch.Tensor | None = None) -> None:
        """A run of `steps` forwards begins (None: not known how many): nothing is fetched for a forward after
        the last."""
        self.steps, self.index, self._host_counts = steps, 0, False
        self.times = times
        self.number += 1

    def progress(self, step: int, of: int) -> None:
        """The host counts the steps itself: number `step` (from 1) of `of` begins, one forward or more."""
        # One that was broken off in its first step is told by its number of steps.
        if not self._host_counts or step < self.index or (step == 1 and of != self.steps):
            self.number += 1
            self.times = None
        self.steps, self.index, self._host_counts = of, step, True

    def end(self) -> None:
        """The run is over, whether or not all of its forwards came."""
        self.steps, self.index, self._host_counts = None, 0, False
        self.times = None

    def count_forward(self) -> None:
        """A forward begins."""
        if not self._host_counts:
            # More forwards than were announced: the same run again.
            self.index = 1 if self.index == self.steps else self.index + 1

    @property
    def goes_on(self) -> bool | None:
        """Whether another step follows this one; None: not known."""
        return None if self.steps is None else self.index < self.steps

    @property
    def steps_left(self) -> int | None:
        """After this one; None: not known."""
        return None if self.steps is None else self.steps - self.index

"""The order in which swapped layers are used: traced in one step, predicted for the next.

A *cycle* is what repeats: it begins when the forward of a model begins that has already run in the current
cycle, so that a ControlNet and its UNet, which alternate, make one cycle, and a text encoder that ran before
them makes its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

L = TypeVar("L", bound=Hashable)


class Order(Generic[L]):
    """Predicts the layers that come next."""

    def __init__(self) -> None:
        self._traces: dict[Hashable, list[L]] = {}
        self._leader: Hashable = None
        self._seen: set[Hashable] = set()
        self._recorded: list[L] = []
        self._predicted: list[L] = []
        self._position = 0
        self.repeats = False
        """Whether the cycle before this one had the same leader: only then is it worth fetching for the
        next."""

    def expect(self, root: Hashable, layers: Sequence[L]) -> None:
        """The model `root` swaps these layers from now on, in about this order."""
        self._traces[root] = list(layers)
        self._restart()

    def forget(self, root: Hashable) -> None:
        """The model `root` swaps nothing any more."""
        self._traces.pop(root, None)
        self._restart()

    def _restart(self) -> None:
        self._leader, self._seen = None, set()
        self._recorded, self._predicted, self._position = [], [], 0
        self.repeats = False

    def begin(self, root: Hashable) -> bool:
        """The forward of the model `root` begins. Returns whether what was predicted before still holds."""
        if self._seen and root not in self._seen:
            self._seen.add(root)
            if self._position >= len(self._predicted):  # This cycle is longer than was known.
                self._predicted = self._predicted + self._traces.get(root, [])
            return True
        if self._leader is not None:
            self._traces[self._leader] = self._recorded
        holds = root == self._leader and self._predicted == self._recorded
        self.repeats = root == self._leader
        self._leader, self._seen, self._recorded = root, {root}, []
        self._predicted = self._traces.get(root, [])
        self._position = 0
        return holds

    def use(self, layer: L) -> bool:
        """`layer` is used now. Returns whether that was expected."""
        self._recorded.append(layer)
        if self._position < len(self._predicted) and self._predicted[self._position] == layer:
            self._position += 1
            return True
        for start in (self._position, 0):
            try:
                self._position = self._predicted.index(layer, start) + 1
                break
            except ValueError:
                continue
        return False

    def ahead(self, count: int, *, wrap: bool) -> L | None:
        """The layer that is used after `count` others, or None; with `wrap` the start of the next cycle
        follows the end of this one, up to one whole cycle."""
        index = self._position + count
        if index < len(self._predicted):
            return self._predicted[index]
        index -= len(self._predicted)
        return self._predicted[index] if wrap and index < self._position else None

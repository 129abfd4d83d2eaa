"""The order in which swapped layers are used: traced in one step, predicted for the next.

A *cycle* is what repeats: it begins when the forward of a model begins that has already run in the current
cycle, so that a ControlNet and its UNet, which alternate, make one cycle. It also begins when a model that is
new to a repeating cycle comes at its end: a text encoder, for the next image.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

L = TypeVar("L", bound=Hashable)


class Order(Generic[L]):
    """Predicts the layers that come next."""

    def __init__(self) -> None:
        self._traces: dict[Hashable, list[L]] = {}  # by leader: the cycle that begins with this model
        self._own: dict[Hashable, set[L]] = {}
        self._broken_off: list[L] | None = None
        self._leader: Hashable = None
        self._seen: set[Hashable] = set()
        self._recorded: list[L] = []
        self._predicted: list[L] = []
        self._position = 0
        self._overtaken = 0  # of those that are predicted next: by the layer that was used last
        self.repeats = False
        """Whether the cycle before this one had the same leader: only then is it worth fetching for the
        next."""

    def expect(self, root: Hashable, layers: Sequence[L]) -> None:
        """The model `root` swaps these layers from now on, in about this order."""
        self._remove(self._own.get(root, set()).difference(layers))
        self._traces[root] = list(layers)
        self._own[root] = set(layers)
        self._restart()

    def forget(self, root: Hashable) -> None:
        """The model `root` swaps nothing any more."""
        self._traces.pop(root, None)
        self._remove(self._own.pop(root, set()))
        self._restart()

    def _remove(self, gone: set[L]) -> None:
        """Takes layers out of everybody's cycles: they would be fetched for nothing, and never be freed."""
        if gone:
            for leader, trace in self._traces.items():
                self._traces[leader] = [layer for layer in trace if layer not in gone]

    def _restart(self) -> None:
        self._leader, self._seen = None, set()
        self._recorded, self._predicted, self._position, self._overtaken = [], [], 0, 0
        self._broken_off = None
        self.repeats = False

    def begin(self, root: Hashable) -> bool:
        """The forward of the model `root` begins. Returns whether what was predicted before still holds."""
        # Layers that were overtaken at the end are left out.
        complete = self._position + self._overtaken >= len(self._predicted)
        if self._seen and root not in self._seen and not (self.repeats and complete):
            self._seen.add(root)
            if complete:  # This cycle is longer than was known; the start of another one may be fetched.
                self._predicted = self._predicted[: self._position] + self._traces.get(root, [])
                self._overtaken = 0
            return not complete
        if self._leader is not None:
            self._learn(self._leader)
        holds = root == self._leader and self._predicted == self._recorded
        self.repeats = root == self._leader
        self._leader, self._seen, self._recorded = root, {root}, []
        self._predicted = self._traces.get(root, [])
        self._position = self._overtaken = 0
        return holds

    def _learn(self, leader: Hashable) -> None:
        """What was recorded is the cycle of `leader` from now on. One that broke off, because its forward
        raised, is not taken for a shorter one, unless it comes twice in a row."""
        predicted, short = self._predicted, self._recorded
        again = bool(short) and short == self._broken_off
        if len(short) < len(predicted) and predicted[: len(short)] == short and not again:
            self._broken_off = short
            if not self._overtaken:  # Else it has been seen where it ends, not where the others belong.
                self._traces[leader] = predicted
        else:
            self._traces[leader], self._broken_off = short, None

    def use(self, layer: L) -> bool:
        """`layer` is used now. Returns whether the others that were predicted are still expected next, in the
        same order.

        A layer that comes before its turn has overtaken some. The next use shows what that means: if one of
        those follows, the order is another one; if the layer follows that stood behind the one that overtook
        them, they are skipped.
        """
        if self._leader is not None:  # Else nobody asks for it: the layer is used by itself.
            self._recorded.append(layer)
        place = self._position
        if place < len(self._predicted) and self._predicted[place] == layer:
            self._position += 1
            self._overtaken = 0
            return True
        try:
            found = self._predicted.index(layer, place)
        except ValueError:
            return self._use_again(layer)
        between = self._predicted[place:found]
        are_skipped = 0 < self._overtaken == len(between)
        self._predicted = [
            *self._predicted[:place],
            layer,
            *(() if are_skipped else between),
            *self._predicted[found + 1 :],
        ]
        self._position += 1
        self._overtaken = 0 if are_skipped else len(between)
        return not are_skipped

    def _use_again(self, layer: L) -> bool:
        """`layer` is not among those that are to come: where it has been before, what followed it then is
        expected to follow again."""
        self._overtaken = 0
        if layer not in self._predicted:
            return True
        self._position = self._predicted.index(layer) + 1
        return False

    def ahead(self, count: int, *, wrap: bool) -> L | None:
        """The layer that is used after `count` others, or None; with `wrap` the start of the next cycle
        follows the end of this one, up to one whole cycle."""
        index = self._position + count
        if index < len(self._predicted):
            return self._predicted[index]
        index -= len(self._predicted)
        return self._predicted[index] if wrap and index < self._position else None

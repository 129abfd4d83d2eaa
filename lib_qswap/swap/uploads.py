"""Residents whose copies have not begun: in the first step they take their turn among the swapped layers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from lib_qswap.swap.layer import Layer


class Uploads:
    """The layers of each model in the order of execution, as long as some of its residents are still to be
    copied.

    A copy stream carries out one copy after the other. With all residents first, the first swapped layer
    would wait for all of them, although compute could long be running; in this order each layer waits for no
    more than what comes before it.
    """

    def __init__(self) -> None:
        self._sequences: dict[Hashable, list[Layer]] = {}  # by root
        self._sequence: list[Layer] = []
        self._place: dict[Layer, int] = {}
        self._next = 0

    def expect(self, root: Hashable, layers: Sequence[Layer]) -> None:
        """The model `root` runs through these layers, resident and swapped ones, in about this order."""
        self.forget(root)
        if any(map(is_waiting, layers)):
            self._sequences[root] = list(layers)

    def forget(self, root: Hashable) -> None:
        """Nothing of the model `root` is to be copied any more."""
        if self._sequences.pop(root, None) is self._sequence:
            self._leave()

    def begin(self, root: Hashable) -> None:
        """A forward of the model `root` begins."""
        if not self._sequences:
            return
        self._leave()
        if any(map(is_waiting, self._sequences.get(root, ()))):
            self._sequence = self._sequences[root]
            self._place = {layer: place for place, layer in enumerate(self._sequence)}
        else:
            self._sequences.pop(root, None)

    @property
    def are_left(self) -> bool:
        """Whether the model that runs has residents that compute has not come to."""
        return bool(self._sequence)

    def before(self, swapped: Layer | None) -> list[Layer]:
        """The residents that compute comes to before `swapped`, each once; all that are left where it is not
        known, or None."""
        if not self._sequence:
            return []
        first = self._next
        end = len(self._sequence)
        place = end if swapped is None else self._place.get(swapped, end)
        self._next = max(first, place)  # Out of turn, it comes before some that have begun.
        found = [layer for layer in self._sequence[first : self._next] if is_waiting(layer)]
        if self._next == len(self._sequence):
            self._leave()
        return found

    def _leave(self) -> None:
        self._sequence, self._place, self._next = [], {}, 0


def is_waiting(layer: Layer) -> bool:
    """Whether `layer` is a resident whose copy has not begun."""
    return layer.resident_ready is not None and not layer.resident_ready.submitted

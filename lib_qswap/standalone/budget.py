"""A budget as people write it: a share of the model, or bytes."""

from __future__ import annotations

import re
from typing import NamedTuple

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_WRITTEN = re.compile(r"(?P<number>\d+(\.\d+)?)\s*((?P<percent>%)|(?P<unit>[KMG]?)(i?B)?)", re.IGNORECASE)

_MOST = 1e15
"""Of bytes, or of percent."""


class Budget(NamedTuple):
    """Device bytes for weights: `nbytes`, plus `share` of the model's packed bytes; one of them is 0."""

    nbytes: int = 0
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads "25%", "512MB", "1.5G" or "100000"; as everywhere in Forge, 1 MB is 2**20 bytes.

        Raises:
            ValueError: with one sentence.
        """
        written = _WRITTEN.fullmatch(text.strip())
        if written is None:
            raise ValueError(
                f"{text!r} is no budget: write a share such as 25%, or bytes such as 512MB or 2GB"
            )
        number = float(written["number"])
        if number > _MOST:
            raise ValueError(f"a budget of {text[:20]}... is more than any device has")
        if written["percent"]:
            return cls(share=number / 100)
        return cls(nbytes=int(number * _UNITS[written["unit"].upper()]))

    def of(self, total_bytes: int) -> int:
        """The budget in bytes for a model of `total_bytes` packed bytes."""
        return self.nbytes + int(self.share * total_bytes)

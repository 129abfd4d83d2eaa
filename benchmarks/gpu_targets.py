"""What gpu_suite.py and step_times.py measured on a GPU, beside what is wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

OF_COPY = 0.85
"""Of the device's copy bandwidth, that unpacking reaches."""
TIMES_CHAIN = 4.0
PRODUCT_OF_COPY = 0.70
"""Of the copy bandwidth, that one token times a packed weight reaches."""
PACKED_OVER_DENSE = 1.05
OVER_BOUND = {"shared": 1.03, "cpu": 1.05, "disk": 1.10}
MORE_AT_10_PERCENT = 0.07
PEAK_OVER_ALLOWED = 1.05
HOST_S = {"resident": 2e-6, "swapped": 25e-6, "together": 25e-6}
"""Of the host for each layer, over those of plain layers; together: swapped, several in one copy."""

Row = Mapping[str, Any]


class Target(NamedTuple):
    """One figure that something is to reach. at_least, at_most: one of them is not None."""

    what: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "met": self.met}


def targets(suite: Row, steps: Row) -> list[Target]:
    """Those of which there is a figure. suite, steps: the two results, whole or not."""
    return [*_of_unpacking(suite.get("unpack", {}).get("types", {})), *_of_steps(steps), *_of_engine(suite)]


def of_copy(row: Row) -> float:
    """The share of the copy bandwidth that the way in use reaches at one shape."""
    return row.get("triton_of_copy", row.get("torch_of_copy", math.nan))


def of_same_size_copy(row: Row) -> float:
    """The same of what a copy of as many bytes reaches."""
    return row.get("triton_of_same_size_copy", row.get("torch_of_same_size_copy", math.nan))


def _of_unpacking(types: Row) -> Iterator[Target]:
    for name, rows in types.items():
        rows = [row for row in rows if "error" not in row]
        if rows:
            yield Target(f"{name}: of copy bandwidth", min(map(of_copy, rows)), at_least=OF_COPY)
            of_same = min(map(of_same_size_copy, rows))
            yield Target(f"{name}: of a copy of that size", of_same, at_least=OF_COPY)
        chains = [
            row["triton_times_faster_than_chain"] for row in rows if "triton_times_faster_than_chain" in row
        ]
        if chains:
            yield Target(f"{name}: times the torch chain", min(chains), at_least=TIMES_CHAIN)
        products = [row["product"]["fused_of_copy"] for row in rows if "product" in row]
        if products:
            yield Target(f"{name}: one token, of copy bandwidth", min(products), at_least=PRODUCT_OF_COPY)


def _of_steps(steps: Row) -> Iterator[Target]:
    for case in steps.get("cases", ()):
        place = case["case"] + ("" if case["stands_for"] is None else f", {case['stands_for']}")
        for row in case["rows"]:
            if "packed_over_dense" in row:
                yield Target(
                    f"{place}: all resident over {row['system']}",
                    row["packed_over_dense"],
                    at_most=PACKED_OVER_DENSE,
                )
            if "location" in row and "ratio" in row and row["budget_share"] >= 0.1:
                more = MORE_AT_10_PERCENT if row["budget_share"] < 0.25 else 0
                yield Target(
                    f"{place}: {row['system']} at {row['budget_share']:.0%}, over the bound",
                    row["ratio"],
                    at_most=OVER_BOUND[row["location"]] + more,
                )


def _of_engine(suite: Row) -> Iterator[Target]:
    host = suite.get("host", {})
    for kind, most_s in HOST_S.items():
        if f"{kind}_s" in host:
            over_s = host[f"{kind}_s"] - host["plain_s"]
            yield Target(f"microseconds of the host for a layer, {kind}", over_s * 1e6, at_most=most_s * 1e6)
    engine = suite.get("engine", {})
    if "switching" in engine:
        row = engine["switching"]
        most = row["later_step_s"] + row["transfer_s"]
        yield Target("first step over a later one and the transfer", row["first_step_s"] / most, at_most=1.05)
        yield Target("bytes back to the host when a model leaves", row["d2h_bytes"], at_most=0)
    if "peak_over_allowed" in engine.get("running_ahead", {}):
        row = engine["running_ahead"]
        yield Target(
            "device peak over budget and activations", row["peak_over_allowed"], at_most=PEAK_OVER_ALLOWED
        )

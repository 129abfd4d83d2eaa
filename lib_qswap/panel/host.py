"""What the panel asks of the program that shows it."""

from __future__ import annotations

from typing import Any, Protocol


class PanelHost(Protocol):
    """A program whose models the panel shows: Forge, the stand-alone demo, a test.

    `snapshot` and `trace` are called on the event loop, up to a few times a second while a generation runs,
    so they must be cheap and must not wait for the device. `plan` and `apply` are called on a worker thread
    and may wait for a lock.
    """

    def snapshot(self) -> dict[str, Any]:
        """The ledger's picture of the process as plain data (ARCHITECTURE.md, "ledger.snapshot()")."""
        ...

    def plan(self, what_if: dict[str, Any]) -> dict[str, Any]:
        """The plan for another budget.

        {"budget_bytes": …} -> {"resident": [names], "ring_bytes": …, "step_s": …, "bound_s": …}.
        Raises ValueError, with one sentence, for a bad value.
        """
        ...

    def apply(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Change settings: {"qswap_location": "Shared", …} -> {"applied": {…}, "messages": [texts]}.

        Raises ValueError, with one sentence that names the setting, for an unknown name or a bad value; then
        nothing is applied.
        """
        ...

    def trace(self) -> list[dict[str, Any]]:
        """Chrome trace events of the last steps."""
        ...

"""Forge as the panel sees it."""

from __future__ import annotations

from typing import Any

from lib_qswap.swap import ledger

from . import controls, extension, settings


class ForgePanelHost:
    """Answers the panel's routes (`lib_qswap.panel.host.PanelHost`)."""

    def snapshot(self) -> dict[str, Any]:
        """The ledger's snapshot, whether QSwap is on, the options (`settings`), and in `host` what the probe
        found and the limit that the user set with Forge's GPU Weights (`weight_limit_bytes`, null: none)."""
        stored = settings.stored()
        return {
            **ledger.snapshot(),
            "enabled": extension.applied(),
            "host": {**extension.status(), "weight_limit_bytes": controls.weight_limit_bytes()},
            "settings": {key: stored.get(key, option.default) for key, option in settings.OPTIONS.items()},
        }

    def plan(self, what_if: dict[str, Any]) -> dict[str, Any]:
        """The plan for the largest of the models that are loaded; the budget includes ring and scratch."""
        budget = what_if.get("budget_bytes")
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
            raise ValueError(f"budget_bytes must be a number of bytes, not {budget!r}")
        attachments = ledger.attachments()
        if not attachments:
            raise ValueError("no model is loaded through QSwap; generate an image first")
        largest = max(attachments, key=lambda attachment: (attachment.active, attachment.payload_bytes))
        plan = largest.make_plan(budget)
        return {
            "resident": list(plan.resident),
            "ring_bytes": plan.ring_bytes,
            "step_s": plan.step_s,
            "bound_s": plan.bound_s,
        }

    def apply(self, changes: dict[str, Any]) -> dict[str, Any]:
        return settings.apply(changes)

    def trace(self) -> list[dict[str, Any]]:
        return ledger.trace_events()

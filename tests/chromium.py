"""Where the browser tests find Chromium, and how they start it."""

from __future__ import annotations

import shutil
from typing import Any

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def launch_options() -> dict[str, Any]:
    """Arguments for playwright's `chromium.launch`; without a Chromium of the system, playwright's own."""
    found = find_chromium()
    return {"args": FLAGS, **({"executable_path": found} if found else {})}

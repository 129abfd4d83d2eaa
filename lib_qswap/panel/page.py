"""The panel's page files, and the element that they draw into."""

from __future__ import annotations

from html import escape
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parents[1]

# A wheel carries the page's files inside the package; a checkout has them where Forge looks for them.
_IN_WHEEL = _PACKAGE / "web"


def mount_html(element_id: str, *, base: str = "", hz: float = 2.0) -> str:
    """The element that the panel draws itself into, as HTML.

    element_id: unique in the page. base: the address that `/qswap/v1/…` is served under, without a trailing
    slash; empty: the page's own folder, which is right for a page at the root of its server, also behind a
    proxy that adds a prefix. hz: how often the panel asks for news while it is visible, 0.1 to 20 times a
    second.

    There is no script in it: `javascript()` finds every such element, also one that comes later.
    """
    if not 0.1 <= hz <= 20:
        raise ValueError(f"the panel's refresh rate must be between 0.1 and 20 per second, not {hz}")
    base = escape(base.rstrip("/"))
    return f'<div id="{escape(element_id)}" class="qswap-panel" data-base="{base}" data-hz="{hz:g}"></div>'


def javascript() -> str:
    """The text of the panel's scripts, for a page that cannot load them from a folder."""
    return "\n".join(path.read_text("utf-8") for path in sorted(_web_folder("javascript").glob("*.js")))


def stylesheet() -> str:
    """The text of the panel's style sheet."""
    return (_web_folder(".") / "style.css").read_text("utf-8")


def _web_folder(in_checkout: str) -> Path:
    return _IN_WHEEL if _IN_WHEEL.is_dir() else _CHECKOUT / in_checkout

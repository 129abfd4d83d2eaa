"""Pictures of the panel: `tests/screenshot_panel.py URL` writes docs/panel-light.png and docs/panel-dark.png.

URL is a page that shows the panel: the demo's, the web UI's (a closed accordion named "QSwap memory" is
opened), or the one of `python tests/fake_panel_host.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.chromium import launch_options

MARGIN_PX = 20


def picture(page: Page, url: str, path: Path) -> None:
    page.goto(url)
    page.wait_for_selector(".qswap-panel, :text('QSwap memory')", state="attached", timeout=60_000)
    panel = page.locator(".qswap-panel:visible").first
    if not panel.is_visible():
        page.locator(":text('QSwap memory'):visible").first.click()
    panel.locator(".qswap-strip:visible").first.wait_for(timeout=60_000)
    panel.scroll_into_view_if_needed()
    page.wait_for_timeout(1500)
    box = panel.bounding_box()
    assert box is not None
    title = page.locator(":text('QSwap memory'):visible").first
    above = title.bounding_box() if title.count() else None
    if above is not None and above["y"] < box["y"]:
        box["height"] += box["y"] - above["y"]
        box["y"] = above["y"]
    page.screenshot(
        path=path,
        full_page=True,
        clip={
            "x": max(0.0, box["x"] - MARGIN_PX),
            "y": max(0.0, box["y"] + page.evaluate("scrollY") - MARGIN_PX),
            "width": box["width"] + 2 * MARGIN_PX,
            "height": box["height"] + 2 * MARGIN_PX,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs")
    parser.add_argument("--width", type=int, default=1160)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**launch_options())
        for theme in ("light", "dark"):
            page = browser.new_page(
                viewport={"width": arguments.width, "height": 1000},
                color_scheme=theme,
                device_scale_factor=2,
            )
            path = arguments.out / f"panel-{theme}.png"
            picture(page, arguments.url, path)
            print(path)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()

"""The panel in a real browser: what it shows, when it asks, and what it does when something is wrong."""

from __future__ import annotations

import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from chromium import launch_options
from fake_panel_host import FakeHost, page_html

pytestmark = pytest.mark.browser

if os.environ.get("CI"):
    import fastapi
    import uvicorn
    from playwright.sync_api import Browser, Error, Page, expect, sync_playwright
else:
    fastapi = pytest.importorskip("fastapi")
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("playwright")
    from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from lib_qswap.panel.page import javascript, mount_html, stylesheet  # noqa: E402
from lib_qswap.panel.routes import add_routes  # noqa: E402

HZ = 20
QUIET_S = 0.5  # ten polls at HZ; long enough to say that nobody asks
CELLS = ".qswap-model:has-text('KModel') .qswap-cells > i"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(**launch_options())
        except Error as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no Chromium: {str(error).partition(chr(10))[0]}")
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1160, "height": 900})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


class Server:
    """A page with the panel at /, and its routes, in this process."""

    def __init__(self, host: FakeHost, html: str, port: int = 0) -> None:
        app = fastapi.FastAPI()
        add_routes(app, host)
        app.add_api_route("/", lambda: fastapi.Response(html, media_type="text/html"))
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(host: FakeHost, html: str | None = None, port: int = 0) -> Server:
        servers.append(Server(host, html or page_html(mount_html("panel", hz=HZ)), port))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def host() -> FakeHost:
    return FakeHost(clock=Clock())


def polls_during(host: FakeHost, seconds: float) -> int:
    time.sleep(0.1)  # an answer that is on its way still counts for before
    before = host.snapshots
    time.sleep(seconds)
    return host.snapshots - before


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def classes(page: Page) -> list[str]:
    return page.eval_on_selector_all(CELLS, "cells => cells.map(cell => cell.className)")


def places(host: FakeHost) -> list[str]:
    layers = host.snapshot()["models"][1]["layers"]
    return [layer["home"] if layer["state"] == "swapped" else layer["state"] for layer in layers]


def test_every_layer_has_a_cell_that_shows_where_it_is_and_follows_it(serve, host, page):
    page.goto(serve(host).url)
    expect(page.locator(CELLS)).to_have_count(304)

    for moment in (0.0, 0.7, 1.5):
        host.clock.now = moment
        expected = places(host)
        assert {"resident", "in_use", "ready", "fetching", "shared", "cpu", "disk"} == set(expected)
        expect(page.locator(CELLS).nth(expected.index("in_use"))).to_have_class(re.compile("qswap-at-in_use"))
        shown = [re.search(r"qswap-at-(\w+)", name).group(1) for name in classes(page)]
        assert shown == expected


def test_places_differ_in_more_than_their_hue(serve, host, page):
    """Each pair differs by pattern, or by at least 15 points of lightness (CIE L*), in both themes."""
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.goto(serve(host).url)
        expect(page.locator(CELLS)).to_have_count(304)
        paints = page.evaluate(
            """(places) => Object.fromEntries(places.map((place) => {
                const swatch = document.querySelector(`.qswap-legend .qswap-at-${place}`);
                const style = getComputedStyle(swatch);
                return [place, [style.backgroundImage.split("(")[0], style.backgroundColor]];
            }))""",
            ["resident", "in_use", "ready", "fetching", "shared", "cpu", "disk"],
        )
        patterns = {pattern for pattern, _ in paints.values()}
        assert patterns == {"none", "linear-gradient", "repeating-linear-gradient", "radial-gradient"}
        plain = {place: lightness(colour) for place, (pattern, colour) in paints.items() if pattern == "none"}
        ordered = sorted(plain.values())
        assert len(ordered) == 4
        assert min(b - a for a, b in itertools.pairwise(ordered)) >= 15, (theme, plain)


def lightness(colour: str) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_the_first_line_says_where_weights_wait_and_what_unpacks_them(serve, host, page):
    page.goto(serve(host).url)
    expect(page.locator(".qswap-location")).to_have_text("Swap location: Auto · unpacked by Triton")


def test_the_first_line_says_what_is_on_the_gpu_what_travels_and_whether_it_stalls(serve, host, page):
    page.goto(serve(host).url)
    expect(page.locator(".qswap-verdict")).to_have_text(
        re.compile(
            r"^6\d % of KModel stays on the GPU, 2\.\d GB travel in each step, "
            r"hidden behind the computation\.$"
        )
    )
    main = host._main_model
    host._main_model = lambda now: {**main(now), "step": {"seconds": 2.0, "stall_s": 0.5, "compute_s": 1.5}}
    expect(page.locator(".qswap-verdict")).to_have_text(re.compile("the GPU waits for them 25 % of the time"))
    expect(page.locator(".qswap-model[open] .qswap-figure-stall")).to_have_class(re.compile("qswap-bad"))
    changed = host._main_model
    host._main_model = lambda now: {**(one := changed(now)), "bytes": {**one["bytes"], "swapped_per_step": 0}}
    expect(page.locator(".qswap-verdict")).to_have_text(
        re.compile(r"^6\d % of KModel stays on the GPU\. Nothing travels: what the rest gives is kept\.$")
    )


def test_the_first_line_is_of_the_model_that_ran_last(serve, host, page):
    main, encoder = host._main_model, host._encoder_model
    used_at = {"main": 2.0, "encoder": 1.0}
    host._main_model = lambda now: {**main(now), "used_at": used_at["main"]}
    host._encoder_model = lambda: {**encoder(), "active": True, "used_at": used_at["encoder"]}
    page.goto(serve(host).url)
    expect(page.locator(".qswap-verdict")).to_have_text(re.compile(r"^6\d % of KModel stays"))
    used_at["encoder"] = 3.0
    expect(page.locator(".qswap-verdict")).to_have_text(re.compile("of JointTextEncoder"))


def test_what_another_image_of_the_same_prompt_is_spared_stands_beside_what_travels(serve, host, page):
    page.goto(serve(host).url)
    detail = page.locator(".qswap-model[open] .qswap-figure-travels .qswap-figure-detail")
    expect(detail).to_have_text(re.compile(r"^at [\d.]+ GB/s$"))
    main = host._main_model

    def spared(now):
        model = main(now)
        return {**model, "bytes": {**model["bytes"], "spared_per_step": 1 << 30}}

    host._main_model = spared
    expect(detail).to_have_text(re.compile("/s; 1.0 GB spared: prompt and steps seen before$"))


def test_numbers_of_the_step_and_memory_are_those_of_the_snapshot(serve, host, page):
    host.clock.now = 5.0
    page.goto(serve(host).url)
    card = page.locator(".qswap-model[open]")

    expect(card.locator(".qswap-figure-step .qswap-figure-name")).to_have_text(
        "Step 3 of 20"
    )  # 5.0 s / 1.92 s
    expect(card.locator(".qswap-figure-step .qswap-figure-value")).to_have_text("1.92 s")
    expect(card.locator(".qswap-figure-stall .qswap-figure-value")).to_have_text("20 ms")
    expect(card.locator(".qswap-figure-pinned .qswap-figure-detail")).to_have_text("of 4.0 GB allowed")
    segments = page.eval_on_selector_all(
        ".qswap-segment:not([hidden])", "all => all.map(each => each.getBoundingClientRect().width)"
    )
    memory = host.snapshot()["device_memory"]
    assert segments[-1] / sum(segments) == pytest.approx(memory["free"] / memory["total"], abs=0.01)
    expect(page.locator(".qswap-key-entry:visible")).to_have_count(6)
    resident = sum(place == "resident" for place in places(host))
    expect(card.locator("[data-place=resident] .qswap-number")).to_have_text(re.compile(f"^{resident} · "))


def test_the_tooltip_of_a_cell_has_the_layers_facts_and_keeps_up(serve, host, page):
    page.goto(serve(host).url)
    page.locator(CELLS).nth(11).hover()
    tooltip = page.locator(".qswap-tooltip")

    expect(tooltip).to_be_visible()
    expect(tooltip.locator(".qswap-tooltip-name")).to_have_text("double_blocks.1.img_attn.qkv")
    expect(tooltip).to_contain_text("Linear, Q4_K")
    expect(tooltip).to_contain_text("15 MB, 28.3 M parameters")
    host.clock.now = 11.5 / 304 * 1.92  # within layer 11
    expect(tooltip).to_contain_text("In use")
    page.mouse.move(5, 5)
    expect(tooltip).to_be_hidden()


def test_the_strip_is_read_with_the_keyboard(serve, host, page):
    page.goto(serve(host).url)
    strip = page.locator(".qswap-model[open] .qswap-strip")
    expect(strip).to_have_attribute(
        "aria-label", re.compile(r"^304 layers of KModel in execution order: \d+ resident")
    )

    page.locator(".qswap-model[open] .qswap-button").focus()
    page.keyboard.press("Tab")
    expect(strip).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(strip).to_have_attribute(
        "aria-valuetext", re.compile(r"^double_blocks\.0\.img_attn\.qkv, Kind Linear")
    )
    page.keyboard.press("End")
    expect(page.locator(".qswap-tooltip-name")).to_have_text("single_blocks.37.linear2")
    expect(page.locator(CELLS).nth(303)).to_have_attribute("data-cursor", "")
    page.evaluate("() => addEventListener('keydown', (event) => (window.pressed = event.key))")
    page.keyboard.press("Escape")
    expect(page.locator(".qswap-tooltip")).to_be_hidden()
    assert page.evaluate("() => window.pressed") is None, "Forge would interrupt the generation"
    page.keyboard.press("Escape")
    assert page.evaluate("() => window.pressed") == "Escape"


def test_the_cell_that_the_keys_have_chosen_is_in_sight(serve, host, page):
    page.set_viewport_size({"width": 360, "height": 300})
    page.goto(serve(host).url)
    page.locator(".qswap-model[open] .qswap-button").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("End")

    expect(page.locator(CELLS).nth(303)).to_be_in_viewport()
    time.sleep(0.2)  # the event of scrolling comes later
    expect(page.locator(".qswap-tooltip-name")).to_be_in_viewport()


def test_keys_of_the_browser_are_left_to_it(serve, host, page):
    page.goto(serve(host).url)
    strip = page.locator(".qswap-model[open] .qswap-strip")
    strip.focus()
    page.evaluate("() => addEventListener('keydown', (event) => (window.prevented = event.defaultPrevented))")
    for key in ("Control+End", "Meta+ArrowRight", "Alt+ArrowRight"):
        page.keyboard.press(key)
        assert page.evaluate("() => window.prevented") is False, key
    expect(strip).to_have_attribute("aria-valuenow", "1")


def test_the_focus_stays_where_it_is_when_models_come_and_go(serve, host, page):
    coming = {
        "name": "ControlNet",
        "managed": True,
        "active": False,
        "layers": host._encoder_model()["layers"],
    }
    models: list[dict] = []
    snapshot = host.snapshot
    host.snapshot = lambda: (now := snapshot()) | {"models": models + now["models"]}
    page.goto(serve(host).url)
    card = page.locator("details:has-text('KModel')")
    cards = page.locator("details.qswap-model")
    for control in (card.locator("summary"), card.locator(".qswap-button"), card.locator(".qswap-strip")):
        control.focus()
        models.append(coming)
        expect(cards).to_have_count(3)
        expect(control).to_be_focused()
        models.clear()
        expect(cards).to_have_count(2)
        expect(control).to_be_focused()


def test_a_model_with_other_layers_keeps_its_card_as_the_reader_left_it(serve, host, page):
    """Another file of the same model; or the same one, from a server that was started anew."""
    main, quant, count = host._main_model, "Q4_K", 304

    def other_layers(now: float) -> dict:
        model = main(now)
        return {**model, "layers": [{**layer, "quant": quant} for layer in model["layers"][:count]]}

    host._main_model = other_layers
    page.goto(serve(host).url)
    card = page.locator("details:has-text('KModel')")
    card.locator(".qswap-button").click()
    strip = card.locator(".qswap-strip")

    quant, count = "Q8_0", 200
    expect(card.locator("tbody tr")).to_have_count(200)
    expect(card.locator("tbody tr").first).to_contain_text("Q8_0")
    expect(card.locator(".qswap-button")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    count = 100
    expect(strip).to_have_attribute("aria-valuemax", "100")
    expect(strip).to_be_focused()
    expect(strip).to_have_attribute("aria-valuenow", "100")
    expect(page.locator(CELLS)).to_have_count(100)
    page.keyboard.press("ArrowLeft")
    expect(strip).to_have_attribute("aria-valuetext", re.compile(re.escape(host.layers[98]["name"])))


def test_a_card_does_not_close_on_who_reads_it_with_the_keyboard(serve, host, page):
    active = True
    main = host._main_model
    host._main_model = lambda now: {**main(now), "active": active}
    page.goto(serve(host).url)
    strip = page.locator("details:has-text('KModel') .qswap-strip")
    strip.focus()
    active = False
    expect(page.locator("details:has-text('KModel') .qswap-pill")).to_have_text("Not loaded")
    expect(strip).to_be_focused()
    expect(strip).to_be_visible()
    strip.blur()
    host.clock.now = 1.0
    expect(strip).to_be_hidden()


# What screen readers would say: each change of a live region, and of the name or value of what has the focus.
LISTEN = """() => {
    window.heard = [];
    const what = '[role=status], [role=alert], [role=log], [aria-live]';
    new MutationObserver((all) => {
        for (const {target, type, attributeName} of all) {
            const element = target.nodeType === Node.TEXT_NODE ? target.parentElement : target;
            if (element.closest(what) && element.textContent) window.heard.push(element.textContent);
            if (type === 'attributes' && element === document.activeElement) window.heard.push(attributeName);
        }
    }).observe(document, {
        childList: true, characterData: true, subtree: true,
        attributeFilter: ['aria-label', 'aria-valuenow', 'aria-valuetext', 'hidden'],
    });
}"""


def test_updates_are_not_read_aloud(serve, host, page):
    page.goto(serve(host).url)
    strip = page.locator(".qswap-model[open] .qswap-strip")
    strip.focus()
    page.keyboard.press("ArrowRight")
    page.evaluate(LISTEN)
    before = classes(page)
    for moment in (0.0, 0.7, 2.5, 5.0):
        host.clock.now = moment
        time.sleep(0.2)

    assert classes(page) != before
    assert page.evaluate("window.heard") == []
    host.clock.now = 5.0 + 1.5 / 304 * 1.92
    strip.blur()
    expect(strip).to_have_attribute("aria-valuetext", re.compile("Uses 3"))


def test_what_happens_is_read_aloud_once(serve, host, page):
    changes: dict[str, object] = {"active": False, "step": {"index": 0, "of": None}}
    main = host._main_model
    host._main_model = lambda now: {**main(now), **changes}
    host.messages = []
    page.goto(serve(host, page_html(mount_html("a", hz=HZ), mount_html("b", hz=HZ))).url)
    page.set_viewport_size({"width": 1160, "height": 2000})
    expect(page.locator("#b .qswap-model-name", has_text="KModel")).to_be_visible()
    page.evaluate(LISTEN)

    def heard() -> list[str]:
        asked = host.snapshots  # who asks for the third time has heard the answer to the second
        wait_until(lambda: host.snapshots >= asked + 3)
        return [text.replace("\xa0", "") for text in page.evaluate("window.heard.splice(0)")]

    for _ in range(2):
        changes["active"] = True
        assert heard() == ["KModel is loaded."]
        for index in (1, 2):
            changes["step"] = {"index": index, "of": 3}
            assert heard() == []
        changes["step"] = {"index": 3, "of": 3}
        assert heard() == ["KModel comes to the end of its steps."]
        changes |= {"active": False, "step": {"index": 0, "of": None}}
        assert heard() == []
    changes["step"] = {"index": 1, "of": 1}  # of an encoder
    assert heard() == []

    host.messages.append({"t": 1.0, "level": "info", "text": "a note"})
    assert heard() == []
    host.messages.append({"t": 2.0, "level": "warning", "text": "2.5 GB are short"})
    assert heard() == ["Warning: 2.5 GB are short"]
    host.messages[-1] = {"t": 3.0, "level": "warning", "text": "2.4 GB are short"}
    assert heard() == []
    host.messages.append({"t": 4.0, "level": "error", "text": "it went wrong"})
    assert heard() == ["Error: it went wrong"]
    host.messages[-1] = {"t": 5.0, "level": "error", "text": "it went wrong"}  # once more
    assert heard() == ["Error: it went wrong"]
    # Who comes to read the page later finds no old news.
    page.wait_for_function("() => !document.querySelector('#a .qswap-spoken').textContent")


def test_a_dead_server_is_read_aloud_once(serve, host, page):
    page.goto(serve(host).url)
    expect(page.locator(CELLS)).to_have_count(304)
    page.evaluate(LISTEN)

    page.route("**/residency*", lambda route: route.abort())
    expect(page.locator(".qswap-trouble")).to_have_text(re.compile("again in 4 s"), timeout=10_000)
    assert page.evaluate("window.heard") == ["No connection to the server."]
    page.unroute("**/residency*")
    expect(page.locator(".qswap-trouble")).to_be_hidden(timeout=10_000)
    assert page.evaluate("window.heard")[1:] == ["The server answers again."]


def test_the_table_has_the_same_layers_and_stays_current(serve, host, page):
    page.goto(serve(host).url)
    card = page.locator(".qswap-model[open]")
    card.locator(".qswap-button").click()

    rows = card.locator("tbody tr")
    expect(rows).to_have_count(304)
    expect(card.locator(".qswap-strip")).to_be_hidden()
    host.clock.now = 3.5 / 304 * 1.92
    expect(rows.nth(3)).to_contain_text(re.compile("4double_blocks.0.img_mlp.0LinearQ4_K20 MB.*In use"))
    card.locator(".qswap-button").click()
    expect(card.locator(".qswap-strip")).to_be_visible()


def test_an_unloaded_model_is_closed_and_one_that_is_left_to_the_host_says_why(serve, host, page):
    page.goto(serve(host).url)

    expect(page.locator("details.qswap-model")).to_have_count(2)
    expect(page.locator("details.qswap-model[open] .qswap-model-name")).to_have_text("KModel")
    expect(page.locator(".qswap-plain")).to_contain_text("plain weights that fit: left to Forge")
    page.locator(".qswap-model-name", has_text="JointTextEncoder").click()
    expect(page.locator(".qswap-model:has-text('JointTextEncoder') .qswap-cells > i").first).to_be_visible()
    host.clock.now = 1.0
    expect(page.locator("details.qswap-model[open]")).to_have_count(2)  # an update does not close it again


def test_a_card_that_the_browsers_search_opens_stays_open(serve, host, page):
    page.goto(serve(host).url)
    card = page.locator("details:has-text('JointTextEncoder')")
    expect(card).not_to_have_attribute("open", "")
    card.evaluate("(card) => { card.open = true; }")
    host.clock.now = 1.0
    polls_during(host, 0.5)
    expect(card).to_have_attribute("open", "")


def test_off_is_one_line(serve, host, page):
    host.enabled = False
    page.goto(serve(host).url)

    expect(page.locator(".qswap-panel")).to_have_text("QSwap is off.", use_inner_text=True)


def test_why_it_is_off_is_said(serve, host, page):
    host.enabled = False
    host.messages.append({"t": 1.0, "level": "error", "text": "of an hour ago"})
    settings, status = {"qswap_enabled": True}, {"supported": True, "reason": None, "error": None}
    snapshot = host.snapshot
    host.snapshot = lambda: {**snapshot(), "settings": settings, "host": status}
    page.goto(serve(host).url)
    panel = page.locator(".qswap-panel")

    expect(panel).to_have_text("QSwap is off until the next generation.", use_inner_text=True)
    status["error"] = "TypeError: it could not start"
    expect(panel).to_have_text("QSwap is off: TypeError: it could not start", use_inner_text=True)
    status |= {"supported": False, "reason": "this is no Forge", "error": None}
    expect(panel).to_have_text("QSwap is off: this is no Forge", use_inner_text=True)
    status["supported"] = True
    settings["qswap_enabled"] = False
    expect(panel).to_have_text("QSwap is off.", use_inner_text=True)
    settings["qswap_enabled"] = host.enabled = True
    expect(page.locator(CELLS)).to_have_count(304)


def test_warnings_are_seen_behind_many_notes(serve, host, page):
    host.messages = [
        {"t": 1.0, "level": "warning", "text": "memory is short"},
        *({"t": 2.0 + i, "level": "info", "text": f"note {i}"} for i in range(20)),
    ]
    page.goto(serve(host).url)

    expect(page.locator(".qswap-message:visible")).to_have_count(4)
    expect(page.locator(".qswap-alarming")).to_contain_text("memory is short")
    expect(page.locator(".qswap-message:visible").last).to_contain_text("note 19")


HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'


def test_names_and_messages_are_text_and_never_markup(serve, page):
    layers = [
        {"i": i, "name": name, "kind": HOSTILE, "quant": HOSTILE, "bytes": 10, "params": 20}
        for i, name in enumerate([HOSTILE, f"a.{HOSTILE}.0.b", "__proto__.1.constructor"])
    ]
    host = FakeHost(layers, clock=Clock())
    host.messages = [{"t": HOSTILE, "level": HOSTILE, "text": HOSTILE}]
    main = host._main_model
    host._main_model = lambda now: {**main(now), "name": HOSTILE}
    page.goto(serve(host).url)

    page.locator(".qswap-model[open] .qswap-cells > i").first.hover()
    expect(page.locator(".qswap-tooltip-name")).to_have_text(HOSTILE)
    page.locator(".qswap-model[open] .qswap-button").click()
    expect(page.locator("tbody .qswap-name").first).to_have_text(HOSTILE)
    expect(page.locator(".qswap-message-text:visible")).to_have_text(HOSTILE)
    assert page.locator(".qswap-panel img, .qswap-panel script").count() == 0
    assert page.evaluate("window.hacked") is None


def test_a_snapshot_with_nothing_but_names_is_drawn(serve, host, page):
    host.snapshot = lambda: {
        "models": [{"name": "m", "active": True, "layers": [{"name": "a"}, {"name": "b"}]}]
    }
    page.goto(serve(host).url)

    expect(page.locator(".qswap-cells > .qswap-at-unknown")).to_have_count(2)
    expect(page.locator(".qswap-figure-step .qswap-figure-value")).to_have_text("–")


def test_nobody_asks_while_the_accordion_is_closed_or_the_page_is_hidden(serve, host, page):
    html = page_html(
        f"<details id=accordion><summary>QSwap memory</summary>{mount_html('panel', hz=HZ)}</details>"
    )
    page.goto(serve(host, html).url)
    assert polls_during(host, QUIET_S) == 0

    page.locator("#accordion > summary").click()
    expect(page.locator(CELLS)).to_have_count(304)
    assert polls_during(host, QUIET_S) >= 3

    page.locator("#accordion > summary").click()
    assert polls_during(host, QUIET_S) == 0

    page.locator("#accordion > summary").click()
    wait_until(lambda: polls_during(host, 0.2) > 0)
    hide = """hidden => {
        const value = hidden ? 'hidden' : 'visible';
        Object.defineProperty(document, 'visibilityState', {value, configurable: true});
        document.dispatchEvent(new Event('visibilitychange'));
    }"""
    page.evaluate(hide, True)
    assert polls_during(host, QUIET_S) == 0
    page.evaluate(hide, False)
    assert polls_during(host, QUIET_S) >= 3


def test_a_dead_server_is_said_so_asked_ever_less_often_and_found_again(serve, host, page):
    first = serve(host)
    page.goto(first.url)
    expect(page.locator(CELLS)).to_have_count(304)
    requests: list[float] = []
    page.on("request", lambda request: requests.append(time.monotonic()))

    first.stop()

    trouble = page.locator(".qswap-trouble")
    expect(trouble).to_have_text(re.compile(r"^No connection to the server\. Trying again in 1 s\.$"))
    expect(page.locator(CELLS)).to_have_count(304)  # the last picture stays, dimmed
    expect(trouble).to_have_text(re.compile("again in 2 s"), timeout=5000)
    requests.clear()
    time.sleep(1.5)
    assert len(requests) <= 1

    serve(host, port=first.port)
    expect(trouble).to_be_hidden(timeout=10_000)


def test_an_error_of_the_server_is_named(serve, host, page):
    page.goto(serve(host).url)
    expect(page.locator(CELLS)).to_have_count(304)

    page.route("**/residency*", lambda route: route.fulfill(status=500))
    expect(page.locator(".qswap-trouble")).to_contain_text("The server answers with error 500")
    page.route("**/residency*", lambda route: route.fulfill(status=401))
    expect(page.locator(".qswap-trouble")).to_contain_text("The server asks for a login", timeout=5000)


def test_an_error_while_drawing_is_shown_and_polling_goes_on(serve, host, page):
    said: list[str] = []
    page.on("console", lambda message: "QSwap" in message.text and said.append(message.text))
    page.goto(serve(host).url)
    expect(page.locator(CELLS)).to_have_count(304)
    page.evaluate("() => { window.figures = qswap.words.figures; qswap.words.figures = () => null.figures; }")
    host.clock.now = 0.7
    fault = page.locator(".qswap-fault")
    expect(fault).to_have_text(re.compile(r"^Not all of this could be drawn \(TypeError: .*\)\.$"))
    for moment in (1.0, 1.2, 1.4):
        host.clock.now = moment
        assert polls_during(host, 0.3) >= 2
    assert len(said) == 1, said

    # What is said of it is no more than a help.
    page.evaluate("() => { qswap.words.news = () => null.news; qswap.words.figures = window.figures; }")
    host.clock.now = 1.5
    expect(fault).to_be_hidden()


def test_an_answer_of_somebody_else_is_said_so_and_asked_again(serve, host, page):
    """Such as the page of a proxy that wants a login."""
    page.goto(serve(host).url)
    expect(page.locator(CELLS)).to_have_count(304)

    page.route("**/residency*", lambda route: route.fulfill(body="<html>", content_type="text/html"))
    expect(page.locator(".qswap-trouble")).to_contain_text("The server's answer is not one of QSwap's.")
    page.unroute("**/residency*")
    expect(page.locator(".qswap-trouble")).to_be_hidden(timeout=5000)
    expect(page.locator(CELLS)).to_have_count(304)


def test_a_slow_server_is_left_alone_for_as_long_as_it_takes_to_answer(serve, host, page):
    page.goto(serve(host).url)
    expect(page.locator(CELLS)).to_have_count(304)
    snapshot = host.snapshot

    def slow() -> dict:
        time.sleep(0.3)
        return snapshot()

    host.snapshot = slow
    time.sleep(0.5)
    assert 2 <= polls_during(host, 3.0) <= 6


def test_two_panels_share_one_poll(serve, host, page):
    page.goto(serve(host, page_html(mount_html("a", hz=HZ), mount_html("b", hz=HZ))).url)
    page.set_viewport_size({"width": 1160, "height": 2000})
    expect(page.locator(CELLS)).to_have_count(608)
    assert 0 < polls_during(host, 1.0) <= HZ * 1.3
    host.clock.now = 1.0
    for panel in ("#a", "#b"):
        expect(page.locator(f"{panel} .qswap-model[open] .qswap-at-in_use")).to_have_count(
            2
        )  # the cell, the legend


def test_another_rate_in_the_settings_counts_at_once(serve, host, page, monkeypatch):
    settings = {"qswap_panel_hz": 2.0}
    original = host.snapshot
    monkeypatch.setattr(host, "snapshot", lambda: {**original(), "settings": dict(settings)})
    page.goto(serve(host).url)
    expect(page.locator(CELLS)).to_have_count(304)
    assert 0 < polls_during(host, 2.0) <= 5, "not as often as the page was made for"
    settings["qswap_panel_hz"] = 10.0
    wait_until(lambda: polls_during(host, 1.0) >= 6)


def test_after_the_first_answer_only_what_changes_is_sent(serve, host, page):
    sizes: list[int] = []
    page.on("response", lambda r: "residency" in r.url and sizes.append(int(r.headers["content-length"])))
    page.goto(serve(host).url)
    wait_until(lambda: page.evaluate("1") == 1 and len(sizes) >= 4)

    assert sizes[0] > 60_000
    assert max(sizes[1:]) < 8_000


def test_a_mount_that_comes_late_or_is_replaced_is_drawn_again(serve, host, page):
    page.goto(serve(host, page_html("<div id=place></div>")).url)
    assert polls_during(host, 0.3) == 0

    insert = "html => { document.getElementById('place').innerHTML = html; }"
    for _ in range(2):  # the second time as Gradio does it: the same markup over what was drawn
        page.evaluate(insert, mount_html("panel", hz=HZ))
        expect(page.locator(CELLS)).to_have_count(304)
    page.evaluate("document.querySelector('.qswap-panel').innerHTML = ''")
    expect(page.locator(CELLS)).to_have_count(304)

    page.evaluate(insert, "")
    wait_until(lambda: polls_during(host, 0.3) == 0)


def test_an_update_makes_no_child_list_mutations(serve, host, page):
    """Forge runs the callbacks of all its extensions at each of them."""
    page.goto(serve(host).url)
    expect(page.locator(CELLS)).to_have_count(304)
    page.locator(CELLS).nth(5).hover()
    page.evaluate(
        """() => {
            window.mutations = 0;
            new MutationObserver((all) => (window.mutations += all.length))
                .observe(document, {childList: true, subtree: true});
        }"""
    )
    before = classes(page)
    for moment in (0.5, 1.0, 1.5):
        host.clock.now = moment
        time.sleep(0.2)

    assert classes(page) != before
    assert page.evaluate("window.mutations") == 0


def test_two_thousand_layers_are_drawn_in_less_than_a_tenth_of_a_second_an_update(serve, page):
    layers = [
        {
            "i": i,
            "name": f"blocks.{i // 8}.part{i % 8}",
            "kind": "Linear",
            "quant": "Q4_K",
            "bytes": 1000 + i,
            "params": 1,
        }
        for i in range(2000)
    ]
    host = FakeHost(layers, clock=Clock())
    page.goto(serve(host).url)
    expect(page.locator(CELLS)).to_have_count(2000)
    page.evaluate(
        """() => {
            window.seconds = [];
            const draw = qswap.View.prototype.draw;
            qswap.View.prototype.draw = function (snapshot) {
                const began = performance.now();
                draw.call(this, snapshot);
                document.body.offsetHeight;  // layout is part of it
                window.seconds.push((performance.now() - began) / 1000);
            };
        }"""
    )
    for update in range(1, 8):
        host.clock.now = update * 0.31
        wait_until(lambda wanted=update: page.evaluate("window.seconds.length") >= wanted)

    seconds = sorted(page.evaluate("window.seconds"))
    assert 0 < seconds[len(seconds) // 2] < 0.1, seconds


@pytest.mark.parametrize(
    ("body_class", "system", "dark"),
    [("", "light", False), ("", "dark", True), ("dark", "light", True), ("gradio-container", "dark", False)],
)
def test_the_theme_is_the_pages_own_or_else_the_systems(serve, host, page, body_class, system, dark):
    page.emulate_media(color_scheme=system)
    page.goto(serve(host, page_html(mount_html("panel", hz=HZ), body_class=body_class)).url)
    card = page.locator(".qswap-model[open]")
    expect(card).to_be_visible()

    surface = card.evaluate("card => getComputedStyle(card).backgroundColor")
    ink = page.locator(".qswap-verdict").evaluate("text => getComputedStyle(text).color")
    assert (lightness(surface) < 20) == dark
    assert abs(lightness(surface) - lightness(ink)) > 70


@pytest.mark.parametrize(("system", "dark"), [("light", False), ("dark", True)])
def test_browsers_without_light_dark_have_the_colours_as_well(serve, host, page, system, dark):
    page.emulate_media(color_scheme=system)
    html = page_html(mount_html("panel", hz=HZ)).replace("light-dark(", "not-known-here(")
    page.goto(serve(host, html).url)
    expect(page.locator(CELLS)).to_have_count(304)

    names = sorted(set(re.findall(r"(--qs-(?!if-)[\w-]+):", stylesheet())))
    assert len(names) > 15
    unknown = page.evaluate(
        """(names) => {
            const style = getComputedStyle(document.querySelector('.qswap-panel'));
            return names.filter((name) => !CSS.supports('color', style.getPropertyValue(name)));
        }""",
        names,
    )
    assert unknown == []
    surface = page.locator(".qswap-model[open]").evaluate("card => getComputedStyle(card).backgroundColor")
    ink = page.locator(".qswap-verdict").evaluate("text => getComputedStyle(text).color")
    assert (lightness(surface) < 20) == dark
    assert abs(lightness(surface) - lightness(ink)) > 70


def test_in_a_narrow_page_nothing_sticks_out_and_messages_have_room(serve, host, page):
    main = host._main_model
    host._main_model = lambda now: {**main(now), "name": "KModel" + "_of_a_long_name" * 6}
    page.set_viewport_size({"width": 320, "height": 900})
    page.goto(serve(host).url)
    expect(page.locator(CELLS)).to_have_count(304)

    assert page.evaluate("document.documentElement.scrollWidth") == 320
    boxes = page.locator(".qswap-message-text:visible").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect().width)"
    )
    assert len(boxes) == 2
    assert min(boxes) > 200


def test_the_page_gets_one_global_only(serve, host, page):
    url = serve(host).url
    page.route("**/blank", lambda route: route.fulfill(body="<html></html>", content_type="text/html"))
    page.goto(f"{url}blank")
    blank = page.evaluate("Object.keys(window)")
    page.goto(url)
    expect(page.locator(CELLS)).to_have_count(304)

    assert set(page.evaluate("Object.keys(window)")) - set(blank) == {"qswap"}


def test_in_gradio_the_panel_opens_with_its_accordion_and_keeps_its_own_colours(page, host):
    gr = pytest.importorskip("gradio")
    head = f"<style>{stylesheet()}</style><script>{javascript()}</script>"
    since_6 = int(gr.__version__.partition(".")[0]) >= 6  # where launch() takes it
    with gr.Blocks(analytics_enabled=False, **({} if since_6 else {"head": head})) as demo:
        for name in ("txt2img", "img2img"):
            with gr.Tab(name), gr.Accordion("QSwap memory", open=False):
                gr.HTML(mount_html(f"qswap-{name}", hz=HZ))
    app, url, _ = demo.launch(
        prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **({"head": head} if since_6 else {})
    )
    try:
        add_routes(app, host)
        page.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: route.abort())
        page.goto(url)
        expect(page.get_by_text("QSwap memory").first).to_be_visible(timeout=20_000)
        assert polls_during(host, QUIET_S) == 0

        page.get_by_text("QSwap memory").first.click()
        expect(page.locator(f"#qswap-txt2img {CELLS}")).to_have_count(304)
        muted = page.locator("#qswap-txt2img .qswap-figure-detail").first.evaluate(
            "e => getComputedStyle(e).color"
        )
        value = page.locator("#qswap-txt2img .qswap-figure-value").first.evaluate(
            "e => getComputedStyle(e).color"
        )
        assert muted != value
        assert polls_during(host, QUIET_S) >= 3

        page.get_by_text("QSwap memory").first.click()
        wait_until(lambda: polls_during(host, 0.3) == 0)
    finally:
        demo.close()

"""The panel's JSON routes, and the files of its page."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_panel_host import FakeHost

fastapi = pytest.importorskip("fastapi")
pytest.importorskip("httpx")
from fastapi.testclient import TestClient  # noqa: E402

from lib_qswap.panel.page import javascript, mount_html  # noqa: E402
from lib_qswap.panel.routes import HOMES, STATES, add_routes  # noqa: E402

RESIDENCY = "/qswap/v1/residency"
SETTINGS = "/qswap/v1/settings"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def host():
    return FakeHost(clock=lambda: 12.3)


def client_of(host, **options) -> TestClient:
    app = fastapi.FastAPI()
    add_routes(app, host, **options)
    return TestClient(app)


def test_residency_is_the_snapshot_with_a_layout_for_each_model(host):
    answer = client_of(host).get(RESIDENCY)

    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    received = answer.json()
    layouts = [model.pop("layout", None) for model in received["models"]]
    assert received == host.snapshot()
    assert layouts[2] is None  # the VAE has no layers
    assert layouts[0] != layouts[1]


def test_the_short_form_has_all_that_changes_and_a_tenth_of_the_bytes(host):
    client = client_of(host)
    full = client.get(RESIDENCY)
    layouts = ",".join(model["layout"] for model in full.json()["models"] if "layout" in model)
    host.clock = lambda: 13.0

    short = client.get(RESIDENCY, params={"known": layouts})

    expected = host.snapshot()["models"]
    for model, truth in zip(short.json()["models"][:2], expected[:2], strict=True):
        assert "layers" not in model
        changing = model["changing"]
        assert [STATES[int(c)] for c in changing["state"]] == [layer["state"] for layer in truth["layers"]]
        assert [HOMES[int(c)] for c in changing["home"]] == [layer["home"] for layer in truth["layers"]]
        assert changing["uses"] == [layer["uses"] for layer in truth["layers"]]
        assert changing["stall_us"] == [layer["stall_us"] for layer in truth["layers"]]
        assert model["step"] == truth["step"]
    assert len(short.content) < len(full.content) / 10


def test_a_layout_changes_with_what_it_stands_for_and_only_then(host):
    client = client_of(host)

    def layout():
        return client.get(RESIDENCY).json()["models"][1]["layout"]

    first = layout()
    host.clock = lambda: 40.0
    assert layout() == first
    host.layers[7]["quant"] = "Q6_K"
    assert layout() != first


def test_a_client_that_knows_another_layout_gets_the_layers(host):
    answer = client_of(host).get(RESIDENCY, params={"known": "0" * 18}).json()

    assert len(answer["models"][1]["layers"]) == 304


def test_a_state_that_the_routes_do_not_know_is_a_dash(host):
    host.snapshot = lambda: {"models": [{"layers": [{"name": "a", "state": "dreaming", "home": None}]}]}
    client = client_of(host)
    layout = client.get(RESIDENCY).json()["models"][0]["layout"]

    changing = client.get(RESIDENCY, params={"known": layout}).json()["models"][0]["changing"]

    assert changing == {"state": "-", "home": "-", "uses": [None], "stall_us": [None]}


def test_numbers_that_json_cannot_hold_are_null(host):
    host.snapshot = lambda: {
        "models": [{"step": {"seconds": float("nan"), "bound_s": float("inf"), "index": 3}}]
    }

    text = client_of(host).get(RESIDENCY).text

    assert json.loads(text) == {"models": [{"step": {"seconds": None, "bound_s": None, "index": 3}}]}


def test_trace_is_a_file_that_perfetto_opens(host):
    answer = client_of(host).get("/qswap/v1/trace")

    assert answer.json()["traceEvents"][0]["ph"] == "X"
    assert "qswap-trace.json" in answer.headers["content-disposition"]


def test_settings_reach_the_host_on_a_thread_that_may_wait(host):
    threads = []
    apply = host.apply
    host.apply = lambda settings: threads.append(threading.current_thread()) or apply(settings)
    snapshot = host.snapshot
    host.snapshot = lambda: threads.append(threading.current_thread()) or snapshot()
    with client_of(host) as client:
        answer = client.post(SETTINGS, json={"qswap_location": "Shared"})
        client.get(RESIDENCY)

    assert answer.status_code == 200
    assert answer.json() == {"applied": {"qswap_location": "Shared"}, "messages": []}
    assert host.applied == {"qswap_location": "Shared"}
    assert threads[0] is not threads[1]


@pytest.mark.parametrize(
    ("body", "content_type", "says"),
    [
        (b'{"qswap_location": "Moon"}', "application/json", "qswap_location must be Auto, GPU"),
        (b'{"qswap_moon": 1}', "application/json", "no setting named 'qswap_moon'"),
        (b"[1, 2]", "application/json", "must be a JSON object"),
        (b"{", "application/json", "not valid JSON"),
        (b"\xff\xfe{", "application/json", "not valid JSON"),
        (b"[" * 50_000, "application/json; charset=utf-8", "not valid JSON"),
        (b" " * 70_000, "application/json", "larger than 65536 bytes"),
        (b'{"qswap_location": "Disk"}', "text/plain", "Content-Type: application/json"),
        (
            b'{"qswap_location": "Disk"}',
            "application/x-www-form-urlencoded",
            "Content-Type: application/json",
        ),
    ],
)
def test_a_bad_request_is_400_with_one_sentence_and_changes_nothing(host, body, content_type, says):
    answer = client_of(host).post(SETTINGS, content=body, headers={"Content-Type": content_type})

    assert answer.status_code == 400
    assert says in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]
    assert host.applied == {}


def test_plan_asks_the_host(host):
    client = client_of(host)

    assert client.post("/qswap/v1/plan", json={"budget_bytes": 2**30}).json()["step_s"] == 1.92
    refused = client.post("/qswap/v1/plan", json={"budget_bytes": "much"})
    assert refused.status_code == 400
    assert "budget_bytes must be a number of bytes, not 'much'" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", RESIDENCY), ("GET", "/qswap/v1/trace"), ("POST", SETTINGS), ("POST", "/qswap/v1/plan")],
)
def test_every_route_is_behind_the_login_of_its_host(host, method, path):
    def login(request: fastapi.Request):
        if request.headers.get("X-User") != "owner":
            raise fastapi.HTTPException(401, "login")

    client = client_of(host, dependencies=[fastapi.Depends(login)])

    assert client.request(method, path, json={}).status_code == 401
    assert client.request(method, path, json={}, headers={"X-User": "owner"}).status_code != 401
    assert host.applied == {}


def test_the_mount_element_carries_its_settings_and_nothing_that_runs():
    html = mount_html('q"><script>', base="/sd/", hz=4)

    assert 'data-base="/sd"' in html
    assert 'data-hz="4"' in html
    assert "<script" not in html
    with pytest.raises(ValueError, match=r"refresh rate must be between 0\.1 and 20"):
        mount_html("q", hz=0)


def test_the_page_never_makes_markup_from_data():
    text = javascript()

    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert unsafe not in text


def test_the_panel_needs_fastapi_for_its_routes_only():
    script = (
        "import sys; sys.modules['fastapi'] = sys.modules['starlette'] = None;"
        "import lib_qswap.panel.host, lib_qswap.panel.page, lib_qswap.panel.report"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)

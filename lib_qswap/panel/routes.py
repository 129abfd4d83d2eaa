"""The panel's JSON routes, for any FastAPI application.

`GET /qswap/v1/residency` answers the ledger's snapshot. Hundreds of layers make some 60 KB of JSON, most of
which never changes (names, kinds, sizes), so each model also carries a `layout`, a hash of what does not
change. A client that polls sends the layouts that it has seen as `?known=HASH,HASH`, and gets for those
models, instead of `layers`, a `changing` entry of a few KB:

    {"state": "0011…", "home": "0120…", "uses": [3, 3, …], "stall_us": [0, 12, …]}

with one character or number a layer, in order; the characters index `STATES` and `HOMES`, "-" is none of
them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from lib_qswap.panel.host import PanelHost

STATES = ("resident", "swapped", "fetching", "ready", "in_use")
HOMES = ("shared", "cpu", "disk")

_STATIC_FIELDS = ("i", "name", "kind", "quant", "bytes", "params")
_BODY_LIMIT_BYTES = 64 * 1024


def add_routes(app: FastAPI, host: PanelHost, *, dependencies: Sequence[Any] = ()) -> None:
    """Adds the panel's routes to `app`: residency and trace (GET), settings and plan (POST).

    dependencies: what FastAPI checks before each of them, so that the host can put them behind its login.
    """

    async def residency(request: Request) -> Response:
        known = frozenset(filter(None, request.query_params.get("known", "").split(",")))
        snapshot = dict(host.snapshot())
        snapshot["models"] = [_with_layout(model, known) for model in snapshot.get("models") or ()]
        return _json(snapshot)

    async def trace(request: Request) -> Response:
        answer = _json({"traceEvents": host.trace()})
        answer.headers["Content-Disposition"] = 'attachment; filename="qswap-trace.json"'
        return answer

    async def settings(request: Request) -> Response:
        return await _ask(host.apply, request)

    async def plan(request: Request) -> Response:
        return await _ask(host.plan, request)

    for path, method, endpoint in (
        ("residency", "GET", residency),
        ("trace", "GET", trace),
        ("settings", "POST", settings),
        ("plan", "POST", plan),
    ):
        app.add_api_route(
            f"/qswap/v1/{path}",
            endpoint,
            methods=[method],
            response_class=Response,
            dependencies=list(dependencies),
            name=f"qswap_{path}",
        )


def _with_layout(model: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """A model's entry with its `layout`; for a client that knows it, with `changing` in place of `layers`."""
    layers = model.get("layers")
    if not layers:
        return dict(model)
    static = tuple(tuple(map(layer.get, _STATIC_FIELDS)) for layer in layers)
    layout = f"{hash(static) & 0xFFFF_FFFF_FFFF_FFFF:016x}"
    if layout not in known:
        return {**model, "layout": layout}
    entry = {key: value for key, value in model.items() if key != "layers"}
    entry["layout"] = layout
    entry["changing"] = {
        "state": "".join(_digit(STATES, layer.get("state")) for layer in layers),
        "home": "".join(_digit(HOMES, layer.get("home")) for layer in layers),
        "uses": [layer.get("uses") for layer in layers],
        "stall_us": [layer.get("stall_us") for layer in layers],
    }
    return entry


def _digit(words: tuple[str, ...], word: Any) -> str:
    return str(words.index(word)) if word in words else "-"


async def _ask(call: Any, request: Request) -> Response:
    """Passes the JSON object in a request's body to the host, on a worker thread, where it may wait."""
    try:
        return _json(await run_in_threadpool(call, await _json_object(request)))
    except ValueError as error:
        return _json({"detail": str(error)}, status=400)


async def _json_object(request: Request) -> dict[str, Any]:
    # With the user's cookies, a page of another site can send forms and plain text here, but not JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ValueError("the body must be sent as Content-Type: application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _BODY_LIMIT_BYTES:
            raise ValueError(f"the body is larger than {_BODY_LIMIT_BYTES} bytes")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is not valid JSON") from None
    if not isinstance(value, dict):
        raise ValueError('the body must be a JSON object, such as {"qswap_location": "Shared"}')
    return value


def _json(content: Any, status: int = 200) -> Response:
    try:
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(content), separators=(",", ":"))
    return Response(text, status, {"Cache-Control": "no-store"}, "application/json")


def _finite(value: Any) -> Any:
    """The same value with null for NaN and Infinity, which JSON has not and browsers refuse."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

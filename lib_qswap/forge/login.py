"""The web UI's login, for QSwap's routes: whoever may use the page may use them, and nobody else."""

from __future__ import annotations

from secrets import compare_digest
from typing import Any

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPBasic, HTTPBasicCredentials

_basic = HTTPBasic(auto_error=False)


def login_dependencies(app: Any, *, api_auth: str | None) -> list[Any]:
    """What FastAPI has to check before each route of `app`; empty where the page is open to all.

    `app` is the page's (Gradio's) application, or a plain FastAPI one when Forge runs without its page. A
    page with a login (`--gradio-auth`) takes its session cookie; `api_auth` (`--api-auth`:
    "user:password,user:password") is taken beside it, and alone where there is no page. It does not close the
    routes of an open page: everybody there can change every setting anyway, and the panel would stop working.
    """
    has_page = hasattr(app, "cookie_id")
    has_login = getattr(app, "auth", None) is not None or getattr(app, "auth_dependency", None) is not None
    passwords = dict(pair.split(":", 1) for pair in api_auth.split(",") if ":" in pair) if api_auth else {}
    if not has_login and (has_page or not passwords):
        return []

    def check(request: Request, credentials: HTTPBasicCredentials | None = Depends(_basic)) -> None:  # noqa: B008
        if has_login and _page_user(app, request) is not None:
            return
        if credentials is not None and credentials.username in passwords:
            expected = passwords[credentials.username]
            if compare_digest(credentials.password.encode(), expected.encode()):
                return
        # Without a page nobody but a program asks: it may be told how. In a page, the header would make the
        # browser pop up its own form.
        headers = None if has_page else {"WWW-Authenticate": "Basic"}
        raise HTTPException(401, "Not authenticated", headers)

    return [Depends(check)]


def _page_user(app: Any, request: Request) -> str | None:
    """The user whom Gradio's session cookie belongs to, as Gradio 4 looks it up for its own routes."""
    if getattr(app, "auth_dependency", None) is not None:
        return app.auth_dependency(request)
    for name in ("access-token", "access-token-unsecure"):
        user = app.tokens.get(request.cookies.get(f"{name}-{getattr(app, 'cookie_id', '')}"))
        if user is not None:
            return user
    return None

"""The pages for a browser: `/`, the fleet as it is now, and `/docs`, the OpenAPI document as a page.

The pages need nothing from another host: they fetch what they show themselves, and ask for a key if the router has
keys. They are therefore open, like the health endpoints, and reveal nothing about the fleet.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from litestar import MediaType, Request, Response, get

from api.access import UNAUTHENTICATED
from api.described import FIELDS, NONE, VERSION, answers
from api.gate import caller_of, needs

PAGE = answers(str, 403, 500, media=MediaType.HTML)
PAGE_OR_JSON = answers(FIELDS, 403, 500)

_LINKS = {"docs": "/docs", "openapi": "/schema/openapi.json", "api": "/v2", "models": "/v2/models"}
_LINKS |= {"health": "/v2/health/ready"}
_ABOUT = "Air traffic control for AI inference: each request runs on the cheapest device that meets its deadline."
_SAFE = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def _digest(text: str, begin: str, end: str) -> str:
    """The content security policy source for the one inline script or style between two tags."""
    inside = text.partition(begin)[2].partition(end)[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"


def _read_page(name: str) -> tuple[str, dict[str, str]]:
    """A page beside this module, and its headers: nothing but itself may run in it."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    script, style = _digest(text, "<script>", "</script>"), _digest(text, "<style>", "</style>")
    policy = f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; form-action 'self'"
    return text, {**_SAFE, "content-security-policy": f"{policy}; base-uri 'none'; frame-ancestors 'none'"}


_DOCS, _DOCS_HEADERS = _read_page("docs.html")
_PAGE, _PAGE_HEADERS = _read_page("page.html")


@get("/", opt=needs(), responses=PAGE_OR_JSON, security=NONE)
async def root(request: Request[Any, Any, Any]) -> Response[Any]:
    """The fleet as a page, if the client prefers HTML; else what this server is, with links, in JSON."""
    if MediaType.HTML.value in request.headers.get("accept", ""):
        return Response(_PAGE, media_type=MediaType.HTML, headers={**_PAGE_HEADERS, "vary": "accept"})
    content = {"name": "taxiway", "about": _ABOUT}
    # without a key no version is shown: it would help to look up known vulnerabilities
    if caller_of(request.scope) is not UNAUTHENTICATED:
        content["version"] = request.app.state[VERSION]
    return Response({**content, "links": _LINKS}, headers={"vary": "accept"})


@get("/docs", opt=needs(), responses=PAGE, security=NONE)
async def docs() -> Response[str]:
    """The OpenAPI document as a page."""
    return Response(_DOCS, media_type=MediaType.HTML, headers=_DOCS_HEADERS)


ENDPOINTS = (root, docs)

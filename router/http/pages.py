"""Pages for a browser: `/`, a short description, and `/docs`, the OpenAPI document as a page.

The page needs nothing from another host. It fetches the document itself, and asks for a key if the router has keys. It
is therefore open, like the health endpoints, and reveals nothing about the fleet.
"""

from __future__ import annotations

import base64
import hashlib
import html
from pathlib import Path
from typing import Any

from litestar import MediaType, Request, Response, get

from router.access.keyring import UNAUTHENTICATED
from router.http import described
from router.http.gate import caller_of, needs

VERSION = "version"
"""Key of the version in the application's state."""

_LINKS = {"docs": "/docs", "openapi": "/schema/openapi.json", "api": "/v2", "models": "/v2/models"}
_LINKS |= {"health": "/v2/health/ready"}
_ABOUT = "Air traffic control for AI inference: each request runs on the cheapest device that meets its deadline."
_DOCS = (Path(__file__).parent / "docs.html").read_text(encoding="utf-8")


def _digest(text: str, begin: str, end: str) -> str:
    """The content security policy source for the one inline script or style between two tags."""
    inside = text.partition(begin)[2].partition(end)[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"


_SAFE = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
_SCRIPT, _STYLE = _digest(_DOCS, "<script>", "</script>"), _digest(_DOCS, "<style>", "</style>")
_POLICY = f"default-src 'none'; script-src {_SCRIPT}; style-src {_STYLE}; connect-src 'self'"
_DOCS_HEADERS = {**_SAFE, "content-security-policy": f"{_POLICY}; base-uri 'none'; frame-ancestors 'none'"}
_ROOT_HEADERS = {**_SAFE, "content-security-policy": "default-src 'none'; frame-ancestors 'none'", "vary": "accept"}


@get("/", opt=needs(), responses=described.PAGE_OR_JSON, security=described.NONE)
async def root(request: Request[Any, Any, Any]) -> Response[Any]:
    """What this server is, with links; HTML if the client prefers it, else JSON."""
    content = {"name": "taxiway", "about": _ABOUT}
    # without a key no version is shown: it would help to look up known vulnerabilities
    if caller_of(request.scope) is not UNAUTHENTICATED:
        content["version"] = request.app.state[VERSION]
    if MediaType.HTML.value in request.headers.get("accept", ""):
        return Response(_page(content), media_type=MediaType.HTML, headers=_ROOT_HEADERS)
    return Response({**content, "links": _LINKS}, headers={"vary": "accept"})


@get("/docs", opt=needs(), responses=described.PAGE, security=described.NONE)
async def docs() -> Response[str]:
    """The OpenAPI document as a page."""
    return Response(_DOCS, media_type=MediaType.HTML, headers=_DOCS_HEADERS)


ENDPOINTS = (root, docs)


def _page(content: dict[str, str]) -> str:
    links = "".join(f'<li><a href="{path}">{name}</a> <code>{path}</code></li>' for name, path in _LINKS.items())
    name = html.escape(" ".join([content["name"], content.get("version", "")]).strip())
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title></head>'
    return f"{head}<body><h1>{name}</h1><p>{_ABOUT}</p><ul>{links}</ul></body></html>"

"""The pages for a browser: `/`, the fleet now and in the last 15 minutes, and `/docs`, the OpenAPI document.

The pages need nothing from another host: they fetch what they show themselves, and ask for a key if the router has
keys. They are therefore open, like the health endpoints, and reveal nothing about the fleet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from litestar import MediaType, Request, Response, get
from litestar.exceptions import NotFoundException

from api.access import UNAUTHENTICATED
from api.described import FIELDS, NONE, answers
from api.gate import PAGE_FILES, caller_of, needs
from taxiway.errors import quoted
from taxiway.release import release

PAGE = answers(str, 403, 500, media=MediaType.HTML)
PAGE_OR_JSON = answers(FIELDS, 403, 500)

_LINKS = {"docs": "/docs", "openapi": "/schema/openapi.json", "api": "/v2", "models": "/v2/models"}
_LINKS |= {"health": "/v2/health/ready"}
_ABOUT = "Air traffic control for AI inference: each request runs on the cheapest device that meets its deadline."

_SOURCES = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; form-action 'self'"
_POLICY = f"{_SOURCES}; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

_FILES = {path.name: path.read_text("utf-8") for path in Path(__file__).parent.iterdir() if path.suffix in _MEDIA}


def _file(name: str) -> Response[str]:
    return Response(_FILES[name], media_type=_MEDIA[Path(name).suffix], headers=_HEADERS)


@get("/", opt=needs(), responses=PAGE_OR_JSON, security=NONE)
async def root(request: Request[Any, Any, Any]) -> Response[Any]:
    """The fleet as a page, if the client prefers HTML; else what this server is, with links, in JSON."""
    if MediaType.HTML.value in request.headers.get("accept", ""):
        page = _file("page.html")
        page.headers["vary"] = "accept"
        return page
    content = {"name": "taxiway", "about": _ABOUT}
    # without a key no version is shown: it would help to look up known vulnerabilities
    if caller_of(request.scope) is not UNAUTHENTICATED:
        content["version"] = release()
    return Response({**content, "links": _LINKS}, headers={"vary": "accept"})


@get("/docs", opt=needs(), responses=PAGE, security=NONE)
async def docs() -> Response[str]:
    """The OpenAPI document as a page."""
    return _file("docs.html")


@get(f"{PAGE_FILES}{{name:str}}", opt=needs(), include_in_schema=False)
async def page_file(name: str) -> Response[str]:
    """The pages' stylesheet, or one of their scripts."""
    if name not in _FILES:
        raise NotFoundException(f"expected one of {sorted(_FILES)}, got {quoted(name)}")
    return _file(name)

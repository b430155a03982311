"""The endpoints of the dead letters, for who has the scope `admin`."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import MediaType, Request, Response, delete, get, post

from router.http import described
from router.operations.dead_letters import DeadLetters
from taxiway.errors import InvalidRequestError

_Any = Request[Any, Any, Any]

MOST = 1000
"""Letters that one list has at most; a list has a tenth of it unless asked."""

STATE = "dead"
"""Where the application keeps the `DeadLetters`."""

_encode = msgspec.json.Encoder().encode


@get("/v2/dead", responses=described.DEAD)
async def dead_list(request: _Any, most: int = MOST // 10) -> Response[bytes]:
    """The messages that were given up, the latest first, up to `most` of them."""
    if not 0 < most <= MOST:
        raise InvalidRequestError(f"most: expected 1 to {MOST}, got {most}", field="most")
    return _json({"letters": await _letters(request).list(most)})


@get("/v2/dead/{letter:str}", responses=described.DEAD)
async def dead_show(request: _Any, letter: str) -> Response[bytes]:
    """One of them with its message."""
    return _json(await _letters(request).show(letter))


@post("/v2/dead/{letter:str}/replay", status_code=200, responses=described.DEAD)
async def dead_replay(request: _Any, letter: str) -> Response[bytes]:
    """Let its job begin again."""
    return _json({"id": letter, "job": await _letters(request).replay(letter)})


@delete("/v2/dead/{letter:str}", status_code=200, responses=described.DEAD)
async def dead_drop(request: _Any, letter: str) -> Response[bytes]:
    """Forget it."""
    await _letters(request).drop(letter)
    return _json({"id": letter, "dropped": True})


ENDPOINTS = (dead_list, dead_show, dead_replay, dead_drop)


def _letters(request: _Any) -> DeadLetters:
    letters: DeadLetters = request.app.state[STATE]
    return letters


def _json(content: Any) -> Response[bytes]:
    return Response(_encode(content), media_type=MediaType.JSON)

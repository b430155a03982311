"""The dead letters: jobs that were given up."""

from __future__ import annotations

from litestar import Response, delete, get, post

from router.http import described
from router.http.endpoints.door import door_of
from router.http.gate import AnyRequest, json_answer
from taxiway.errors import InvalidRequestError

MOST = 1000
"""Most dead letters in one list; the default is a tenth of it."""


@get("/v2/dead", responses=described.DEAD)
async def dead_list(request: AnyRequest, most: int = MOST // 10) -> Response[bytes]:
    """Dead letters, latest first, up to `most`."""
    if not 0 < most <= MOST:
        raise InvalidRequestError(f"most: expected 1 to {MOST}, got {most}", field="most")
    return json_answer({"letters": await door_of(request).letters.list(most)})


@get("/v2/dead/{letter:str}", responses=described.DEAD)
async def dead_show(request: AnyRequest, letter: str) -> Response[bytes]:
    """One dead letter with its message."""
    return json_answer(await door_of(request).letters.show(letter))


@post("/v2/dead/{letter:str}/replay", status_code=200, responses=described.DEAD)
async def dead_replay(request: AnyRequest, letter: str) -> Response[bytes]:
    """Run a dead letter's job again."""
    return json_answer({"id": letter, "job": await door_of(request).letters.replay(letter)})


@delete("/v2/dead/{letter:str}", status_code=200, responses=described.DEAD)
async def dead_drop(request: AnyRequest, letter: str) -> Response[bytes]:
    """Delete a dead letter."""
    await door_of(request).letters.drop(letter)
    return json_answer({"id": letter, "dropped": True})


ENDPOINTS = (dead_list, dead_show, dead_replay, dead_drop)

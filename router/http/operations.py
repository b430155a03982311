"""The endpoints for operators: dead letters, which need the scope `admin`, and the list of jobs."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import MediaType, Request, Response, delete, get, post
from litestar.params import Parameter, QueryParameter

from router.http import described
from router.http.gate import caller_of, claim, needs
from router.operations.dead_letters import DeadLetters
from router.service.arrivals import Router
from taxiway.contract.listing import USUAL, JobFilter, states_of
from taxiway.errors import InvalidRequestError

_Any = Request[Any, Any, Any]

MOST = 1000
"""Most dead letters in one list; the default is a tenth of it."""

DEAD_LETTERS, ROUTER = "dead_letters", "router"
"""Keys of the `DeadLetters` and the `Router` in the application's state."""

_encode = msgspec.json.Encoder().encode


@get("/v2/dead", responses=described.DEAD)
async def dead_list(request: _Any, most: int = MOST // 10) -> Response[bytes]:
    """Dead letters, latest first, up to `most`."""
    if not 0 < most <= MOST:
        raise InvalidRequestError(f"most: expected 1 to {MOST}, got {most}", field="most")
    return _json({"letters": await _letters(request).list(most)})


@get("/v2/dead/{letter:str}", responses=described.DEAD)
async def dead_show(request: _Any, letter: str) -> Response[bytes]:
    """One dead letter with its message."""
    return _json(await _letters(request).show(letter))


@post("/v2/dead/{letter:str}/replay", status_code=200, responses=described.DEAD)
async def dead_replay(request: _Any, letter: str) -> Response[bytes]:
    """Run a dead letter's job again."""
    return _json({"id": letter, "job": await _letters(request).replay(letter)})


@delete("/v2/dead/{letter:str}", status_code=200, responses=described.DEAD)
async def dead_drop(request: _Any, letter: str) -> Response[bytes]:
    """Delete a dead letter."""
    await _letters(request).drop(letter)
    return _json({"id": letter, "dropped": True})


_States = Annotated[str, QueryParameter(name="state", description="Only jobs in these states, comma-separated.")]
_Model = Annotated[str, Parameter(description="Only jobs of this model: `name`, `name:version` or `name@alias`.")]
_Tenant = Annotated[str, Parameter(description="Only this tenant's jobs; with a key, only its own tenant is allowed.")]
_Limit = Annotated[int, Parameter(description="Jobs per page, at most 1,000.")]
_Cursor = Annotated[str, Parameter(description="The `next` of the previous page.")]


@get("/v2/jobs", opt=needs("read"), responses=described.JOBS)
async def jobs(
    request: Request[Any, Any, Any],
    states: _States = "",
    model: _Model = "",
    tenant: _Tenant = "",
    limit: _Limit = USUAL,
    cursor: _Cursor = "",
) -> Response[bytes]:
    """The fleet's jobs, latest first. While `next` is present more may follow, even after an empty page."""
    router: Router = request.app.state[ROUTER]
    asked = {"tenant": tenant} if tenant else {}
    claim(caller_of(request.scope), asked)
    wanted = JobFilter(
        states=states_of(name for name in states.split(",") if name),
        model=router.rules.catalogue.resolve(model).id if "@" in model else model,
        tenant=asked.get("tenant", ""),
    )
    page = await router.store.list_jobs(wanted, limit=limit, cursor=cursor)
    return _json(page)


ENDPOINTS = (dead_list, dead_show, dead_replay, dead_drop, jobs)


def _letters(request: _Any) -> DeadLetters:
    letters: DeadLetters = request.app.state[DEAD_LETTERS]
    return letters


def _json(content: Any) -> Response[bytes]:
    return Response(_encode(content), media_type=MediaType.JSON)

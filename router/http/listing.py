"""The endpoint that lists jobs: with a key its tenant's alone."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import MediaType, Request, Response, get
from litestar.params import Parameter, QueryParameter

from router.http import described
from router.http.gate import caller_of, claim, needs
from router.service.arrivals import Router
from taxiway.contract.listing import USUAL, JobFilter, states_of

STATE = "listing"
"""Where the application keeps the `Router`."""

_encode = msgspec.json.Encoder().encode

_States = Annotated[str, QueryParameter(name="state", description="Only jobs in one of these states, with commas.")]
_Model = Annotated[str, Parameter(description="Only jobs of this model: `name`, `name:version` or `name@alias`.")]
_Tenant = Annotated[str, Parameter(description="Only this tenant's jobs; with a key these alone may be asked for.")]
_Limit = Annotated[int, Parameter(description="Jobs of a page, 1,000 at most.")]
_Cursor = Annotated[str, Parameter(description="The `next` of the page before.")]


@get("/v2/jobs", opt=needs("read"), responses=described.JOBS)
async def jobs(
    request: Request[Any, Any, Any],
    states: _States = "",
    model: _Model = "",
    tenant: _Tenant = "",
    limit: _Limit = USUAL,
    cursor: _Cursor = "",
) -> Response[bytes]:
    """The fleet's jobs, the latest first; while `next` is there, more may follow, also behind an empty page."""
    router: Router = request.app.state[STATE]
    asked = {"tenant": tenant} if tenant else {}
    claim(caller_of(request.scope), asked)
    wanted = JobFilter(
        states=states_of(name for name in states.split(",") if name),
        model=router.rules.catalogue.resolve(model).id if "@" in model else model,
        tenant=asked.get("tenant", ""),
    )
    page = await router.store.list_jobs(wanted, limit=limit, cursor=cursor)
    return Response(_encode(page), media_type=MediaType.JSON)

"""The Responses API at its paths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Annotated, Literal

import msgspec
from litestar import Response as HttpResponse
from litestar import get
from litestar.params import Parameter
from litestar.types import ASGIApp

from api.answers import HttpAnswer, json_whole
from api.described import ASKED, RUN, Evented, deletes, openai_answers, posts, takes
from api.gate import AnyRequest, json_answer, needs
from api.openai.calls import EVENT_HEADERS, Begun, Calls, Read, headers_of_placement, headers_of_result
from api.openai.endpoints import read_body, read_request
from api.openai.requests import ParsedCall, tier_for_later
from api.openai.responses.events import ResponseWriter, replay
from api.openai.responses.response import (
    Conversation,
    Item,
    Response,
    ResponseCall,
    StoredResponse,
    begun,
    check_response_call,
    input_items,
    response_fields,
    restarted,
    succeeded,
)
from api.openai.responses.stored import Responses
from api.services import router_of, services_of, tenant_of
from api.storage.objects import Deleted, Page, owner_of, page_of
from taxiway.contract.job import Result
from taxiway.errors import wrong_field

LISTED_ITEMS = 100
"""Items in one page of a response's input."""

_Limit = Annotated[int, Parameter(description="Items per page.", ge=1, le=LISTED_ITEMS)]
_After = Annotated[str, Parameter(description="The id of the last item of the previous page.")]
_Stream = Annotated[bool, Parameter(description="As server-sent events, from the first one on.")]
_StartingAfter = Annotated[
    int, Parameter(description="With `stream`: the `sequence_number` of the last event that is known.", ge=-1)
]
_Order = Annotated[Literal["asc", "desc"], Parameter(description="As they were given, or the other way round.")]


@posts(
    "/v1/responses",
    opt=needs("submit"),
    operation_class=takes(ResponseCall, events=True),
    responses=openai_answers(Response, *ASKED, *RUN),
)
async def response_create(request: AnyRequest) -> ASGIApp:
    """Answer a chat: at once, as server-sent events with `stream`, or later with `background`."""
    making = await _Making.asked_by(request)
    call = making.parsed.call
    if call.stream:
        return await Calls(request).stream(making.read, making.begin_stream)
    if call.background:
        return await making.later()
    return await making.whole()


@get(
    "/v1/responses/{response:str}",
    opt=needs("read"),
    operation_class=Evented,
    responses=openai_answers(Response, 400, 404, 503),
)
async def response_retrieve(
    request: AnyRequest, response: str, stream: _Stream = False, starting_after: _StartingAfter = -1
) -> ASGIApp:
    """A stored response, or with `stream` its events as server-sent events, including those to come."""
    found = (await _responses(request).get(response, tenant_of(request))).response
    if not stream:
        return json_whole(msgspec.json.encode(found))
    if found.ended:
        return HttpAnswer(200, EVENT_HEADERS, (replay(found, starting_after),))
    writer = ResponseWriter(restarted(found), starting_after)

    async def ended(result: Result) -> None:
        writer.finish(result, _now(request))

    return await Calls(request).follow(found.job, Begun(writer, ended, stays=True))


@posts("/v1/responses/{response:str}/cancel", opt=needs("submit"), responses=openai_answers(Response, 400, 404, 503))
async def response_cancel(request: AnyRequest, response: str) -> HttpResponse[bytes]:
    """Cancel a response in the background; one that has ended is left unchanged."""
    found = await _responses(request).get(response, tenant_of(request))
    if not found.response.background:
        raise wrong_field("response_id", "a response in the background", response)
    return json_answer((await _responses(request).cancel(response, tenant_of(request))).response)


@deletes("/v1/responses/{response:str}", opt=needs("submit"), responses=openai_answers(Deleted, 404, 503))
async def response_delete(request: AnyRequest, response: str) -> HttpResponse[bytes]:
    """Delete a stored response, and cancel it if it has not ended."""
    await _responses(request).delete(response, tenant_of(request))
    return json_answer(Deleted(id=response, object="response"))


@get("/v1/responses/{response:str}/input_items", opt=needs("read"), responses=openai_answers(Page, 400, 404, 503))
async def response_input(
    request: AnyRequest, response: str, limit: _Limit = 20, after: _After = "", order: _Order = "desc"
) -> HttpResponse[bytes]:
    """The input of a stored response, without that of the responses before it."""
    items = (await _responses(request).get(response, tenant_of(request))).input
    listed = items if order == "asc" else items[::-1]
    names = [item["id"] for item in listed]
    begin = names.index(after) + 1 if after in names else 0
    return json_answer(page_of(listed[begin : begin + limit], len(listed) > begin + limit, itemgetter("id")))


class _Making:
    """A response that is being made for a call."""

    def __init__(
        self, request: AnyRequest, parsed: ParsedCall[ResponseCall], read: Read, earlier: Sequence[str]
    ) -> None:
        self.parsed, self.read = parsed, read
        self._request = request
        self._earlier = earlier

    @classmethod
    async def asked_by(cls, request: AnyRequest) -> _Making:
        """The call in a request, after the conversation that it continues."""
        parsed = await read_body(request, ResponseCall)
        call = parsed.call
        earlier = Conversation()
        check_response_call(call)
        if call.previous_response_id is not None:
            owner = owner_of(tenant_of(request))
            earlier = await _responses(request).conversation(call.previous_response_id, owner)
        topology = router_of(request).rules.topology
        tier = tier_for_later(call.service_tier, topology) if call.background else call.service_tier
        fields = partial(response_fields, before=earlier.items)
        size = len(msgspec.json.encode(earlier.items)) if earlier.items else 0
        read = await read_request(request, parsed, fields, tier, size=size, label=earlier.locality)
        return cls(request, parsed, read, earlier.names)

    async def whole(self) -> ASGIApp:
        """The answer of the job, once that has ended."""
        job, result = await Calls(self._request).run(self.read)
        response = succeeded(self._begun(job), result, _now(self._request))
        if self.parsed.call.stored:
            await self._keep(response)
        return json_whole(msgspec.json.encode(response), headers_of_result(job, result))

    async def later(self) -> ASGIApp:
        """The response once its job has been accepted."""
        accepted, _ = await Calls(self._request).begin(self.read, self._keep_begun)
        response = self._begun(accepted.job)
        return json_whole(msgspec.json.encode(response), headers_of_placement(accepted))

    async def begin_stream(self, job: str) -> Begun:
        """What writes the job's events."""
        call, writer = self.parsed.call, ResponseWriter(self._begun(job))
        if call.background:
            await self._keep_begun(job)

        async def ended(result: Result) -> None:
            response = writer.finish(result, _now(self._request))
            if call.stored and not call.background:
                await self._keep(response)

        return Begun(writer, ended, stays=bool(call.background))

    async def _keep_begun(self, job: str) -> None:
        await self._keep(self._begun(job))

    async def _keep(self, response: Response) -> None:
        items: list[Item] = input_items(self.parsed.call, response.job)
        owner = owner_of(tenant_of(self._request))
        request = self.read.request
        stored = StoredResponse(
            tenant=owner,
            input=items,
            earlier=[*self._earlier],
            response=response,
            webhook=request.webhook,
            locality=request.locality,
        )
        await _responses(self._request).keep(stored)

    def _begun(self, job: str) -> Response:
        return begun(self.parsed.call, self.read.model, self.read.head(job))


def _responses(request: AnyRequest) -> Responses:
    return services_of(request).responses


def _now(request: AnyRequest) -> int:
    return int(router_of(request).store.clock.now())

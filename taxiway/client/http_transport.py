"""The transport at http://: Open Inference Protocol v2, and taxiway's job endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, NotRequired, TypedDict
from urllib.parse import quote, urlencode

import msgspec

from taxiway.client import Receipt
from taxiway.client.http_link import LONGEST_WAIT, HttpLink, HttpResponse, NotAStreamError
from taxiway.contract.job import JobStatus, Result, RunReport
from taxiway.contract.limits import Buffer
from taxiway.contract.request import TERMS, Request, Terms, new_id
from taxiway.contract.server_events import ServerEvent
from taxiway.contract.stream import EVENT_KINDS, Event, EventStream
from taxiway.contract.tensors import (
    HEADER,
    OCTETS,
    SINGLE,
    Framed,
    Show,
    array,
    body,
    decode_outputs,
    encode_inputs,
    inline,
    placed,
    single_row,
    split,
)
from taxiway.contract.values import to_wire
from taxiway.contract.wire import submitting
from taxiway.errors import (
    BrokerUnavailableError,
    FleetUnavailable,
    InvalidRequestError,
    RateLimitedError,
    RequestError,
    ResultTimeoutError,
    TaxiwayError,
    cut,
    error_of_code,
    invalid,
)
from taxiway.listing import JobFilter, JobPage

_POLL_PAUSE = 0.05
"""Minimum seconds between two polls."""

_RETRY_FOR = 10.0
"""Seconds for which a rate-limited call is retried."""

_SPREAD = 0.25
"""Seconds over which callers that were refused together spread their retries."""

_DEFAULTS = Terms()

_MALFORMED = (msgspec.MsgspecError, LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError)
"""What reading an answer raises that no router would send."""


class _Spec(TypedDict):
    """An input or output in a model's metadata."""

    name: str
    datatype: str
    shape: list[int]
    batch_axis: NotRequired[int | None]


class _Metadata(TypedDict):
    """What the transport reads of a model's metadata."""

    inputs: Annotated[list[_Spec], msgspec.Meta(min_length=1)]
    outputs: list[_Spec]


@dataclass(frozen=True, slots=True)
class _InferRequest:
    """A request in the transport's form; `single` means that its inputs have no batch axis."""

    path: str
    body: Framed
    single: bool


class HttpClientTransport:
    """Requests to a router. A model's metadata is fetched once; it gives plain inputs their names and datatypes.

    `key` authenticates the caller.

    Raises:
        InvalidRequestError: a durability was given; a router's queues.yaml sets it.
    """

    def __init__(self, url: str, connect_timeout: float, show: Show, key: str | None, confirmed_by: int) -> None:
        if confirmed_by:
            raise invalid("durability", "none for a router, whose limits.durability decides", "'replicated'")
        self._link = HttpLink(url, connect_timeout, key)
        self._show = show
        self._accepts = {"accept": OCTETS} if show is array else {}
        self._known: dict[str, _Metadata] = {}

    async def submit(self, request: Request) -> Receipt:
        """Accept the request; answered as soon as it is placed."""
        ask = await self._infer_request(_resendable(request))
        response = await self._post_inference(ask, request.model, prefer="respond-async")
        return Receipt(_job_of(response), single=ask.single)

    async def infer(self, request: Request, timeout: float | None) -> Result:
        """Submit and wait for the answer in one exchange; a router that does not wait returns a job to poll.

        With `timeout`, a broken exchange is retried: the idempotency key makes both attempts one job.
        """
        ask = await self._infer_request(_resendable(request))
        try:
            async with asyncio.timeout(timeout):
                response = await self._exchange(ask, request.model, again=timeout is not None)
                if response.status != HTTPStatus.ACCEPTED:
                    return self._result(response, ask.single)
                return await self.result(Receipt(_job_of(response), single=ask.single), timeout)
        except TimeoutError as error:
            raise _timeout_error(timeout) from error

    async def _exchange(self, ask: _InferRequest, model: str, *, again: bool) -> HttpResponse:
        """The router's answer to an infer request whose caller waits."""
        sent = False
        while True:
            try:
                return await self._post_inference(ask, model, prefer=f"wait={LONGEST_WAIT:g}")
            except BrokerUnavailableError as error:
                sent = sent or error.details.get("sent", False)
                if not (sent and again):
                    raise
            await asyncio.sleep(random.uniform(_POLL_PAUSE, _SPREAD))

    async def result(self, receipt: Receipt, timeout: float | None) -> Result:
        """The job's answer, by long polling; with `timeout`, outages are waited out."""
        clock = asyncio.get_running_loop().time
        until = math.inf if timeout is None else clock() + timeout
        while True:
            started = clock()
            wait = min(LONGEST_WAIT, max(0.0, until - started))
            pause = min(wait, _POLL_PAUSE)
            try:
                found = await self._poll(receipt, wait)
            except BrokerUnavailableError:
                if timeout is None or clock() >= until:
                    raise
                found, pause = None, random.uniform(_POLL_PAUSE, _SPREAD)
            if found is not None:
                return found
            if clock() >= until:
                raise _timeout_error(timeout)
            await asyncio.sleep(pause if clock() - started < pause else 0)

    async def _poll(self, receipt: Receipt, wait: float) -> Result | None:
        """The job's answer if it comes within `wait` seconds."""
        path = f"{_job_path(receipt.job)}/result?wait={wait:.3f}"
        response = await self._answer("GET", path, headers=self._accepts)
        return None if response.status == HTTPStatus.ACCEPTED else self._result(response, receipt.single)

    async def stream(self, receipt: Receipt, timeout: float | None) -> EventStream:
        """The events of the answer as it is generated, then the result."""
        async with self._events(receipt.job, timeout) as events:
            async for event in events:
                yield self._decode_event(event, receipt.single)
                if event.kind == "result":
                    return
        raise FleetUnavailable("the router's stream ended without a result; the job continues")

    async def status(self, receipt: Receipt) -> JobStatus:
        """Where the job is."""
        fields = _read_json(await self._answer("GET", _job_path(receipt.job)))
        with _understood():
            return msgspec.convert(fields, JobStatus)

    async def placement(self, receipt: Receipt) -> dict[str, Any]:
        """Why the job was placed where it is."""
        return await self.administer("GET", f"{_job_path(receipt.job)}/placement")

    async def what_if(self, request: Request) -> dict[str, Any]:
        """Where the request would run now and why."""
        ask = await self._infer_request(request)
        return _read_json(await self._answer("POST", f"{ask.path}/placement", ask.body.pieces, ask.body.headers))

    async def cancel(self, receipt: Receipt) -> None:
        """Request cancellation of the job."""
        _read_json(await self._answer("DELETE", _job_path(receipt.job)))

    async def jobs(self, wanted: JobFilter, limit: int, cursor: str) -> JobPage:
        """A page of the jobs that match `wanted`, most recent first."""
        states = ",".join(sorted(wanted.states))
        filters = {"state": states, "model": wanted.model, "tenant": wanted.tenant, "cursor": cursor}
        query = urlencode({"limit": limit, **{name: text for name, text in filters.items() if text}})
        answer = _read_json(await self._answer("GET", f"/v2/jobs?{query}"))
        with _understood():
            return msgspec.convert(answer, JobPage)

    async def models(self) -> list[dict[str, Any]]:
        """What the fleet can run."""
        with _understood():
            return msgspec.convert(_read_json(await self._answer("GET", "/v2/models"))["models"], list[dict[str, Any]])

    async def infer_line(self, request: Request) -> tuple[str, bytes]:
        """The path of an infer request, and its body as one line of JSON."""
        path, fields, tensors, _ = await self._parts(request)
        return path, inline(fields, tensors)

    def line_result(self, status: int, body: bytes) -> Result:
        """The result in an infer answer; raises the error in it."""
        return self._result(HttpResponse(status, {}, body), None)

    async def exchange(self, verb: str, path: str, body: Sequence[Buffer] = (), media: str = "") -> bytes:
        """The body of the answer to a request with a `body` of that media type."""
        response = await self._answer(verb, path, body, {"content-type": media} if media else None)
        if not response.ok:
            _read_json(response)
        return bytes(response.body)

    async def administer(self, verb: str, path: str) -> dict[str, Any]:
        """The router's answer; what changes something is asked once."""
        asked = self._answer(verb, path) if verb == "GET" else self._link.ask(verb, path, once=True)
        return _read_json(await asked)

    def _decode_event(self, event: ServerEvent, single: bool | None) -> Event | Result:
        """Decode an event of a job's stream; an error event raises the job's error."""
        if event.kind == "result":
            return self._result(HttpResponse(HTTPStatus.OK, {}, event.data.encode()), single)
        with _understood():
            content = msgspec.json.decode(event.data)
            if event.kind == "error":
                raise error_of_code(content["code"], content["error"], content["details"])
            kind = EVENT_KINDS.get(event.kind)
            return str(content["text_output"]) if kind is None else msgspec.convert(content, kind)

    async def close(self) -> None:
        """Close all connections."""
        await self._link.close()

    @contextlib.asynccontextmanager
    async def _events(self, job: str, timeout: float | None) -> AsyncIterator[AsyncIterator[ServerEvent]]:
        """The events of a job's stream; failures of the stream are raised as taxiway's errors."""
        until = None if timeout is None else asyncio.get_running_loop().time() + timeout
        try:
            async with contextlib.aclosing(self._link.events(f"{_job_path(job)}/stream", until)) as events:
                yield events
        except TimeoutError as error:
            raise _timeout_error(timeout) from error
        except NotAStreamError as error:
            _read_json(error.response)

    async def _answer(
        self, method: str, path: str, body: Sequence[Buffer] = (), headers: Mapping[str, str] | None = None
    ) -> HttpResponse:
        """The router's answer; a rate-limited call is retried after `Retry-After`, for up to `_RETRY_FOR` seconds."""
        clock = asyncio.get_running_loop().time
        until = clock() + _RETRY_FOR
        while True:
            response = await self._link.ask(method, path, body, headers)
            pause = _retry_pause(response)
            if pause is None or clock() + pause > until:
                return response
            await asyncio.sleep(pause)

    async def _post_inference(self, ask: _InferRequest, model: str, *, prefer: str) -> HttpResponse:
        """The router's answer to an infer request.

        After a refusal the model's metadata is fetched again with the next request: the model may have been replaced.
        """
        with submitting(model) as trace:
            headers = {**ask.body.headers, **trace, "prefer": prefer}
            response = await self._answer("POST", f"{ask.path}/infer", ask.body.pieces, headers)
        if response.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND):
            self._known.pop(model, None)
        return response

    async def _infer_request(self, request: Request) -> _InferRequest:
        path, fields, tensors, single = await self._parts(request)
        return _InferRequest(path, body(fields, tensors), single)

    async def _parts(self, request: Request) -> tuple[str, dict[str, Any], list[dict[str, Any]], bool]:
        """An infer request: its path, fields and tensors, and whether its inputs have no batch axis."""
        path = f"/v2/models/{quote(request.model, safe=':@')}"
        if request.model not in self._known:
            with _understood():
                answer = _read_json(await self._answer("GET", path))
                self._known[request.model] = msgspec.convert(answer, _Metadata)
        known = self._known[request.model]
        try:
            tensors, single = encode_inputs(known["inputs"], request.inputs)
        except InvalidRequestError:
            self._known.pop(request.model)  # as after a refusal in `_post_inference`
            raise
        terms = {name: getattr(request, name) for name in TERMS if getattr(request, name) != getattr(_DEFAULTS, name)}
        fields: dict[str, Any] = {"parameters": {**to_wire(request.parameters, "parameters"), **terms}}
        if request.outputs or self._accepts:
            wanted = [spec for spec in known["outputs"] if not request.outputs or spec["name"] in request.outputs]
            unknown = [{"name": name} for name in request.outputs if name not in {spec["name"] for spec in wanted}]
            fields["outputs"] = [self._output(spec) for spec in wanted] + unknown  # the router reports these
        return path, fields, single_row(known["inputs"], tensors) if single else tensors, single

    def _output(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """The request's entry for an output: tensors of numbers are requested as raw data if they become arrays."""
        raw = bool(self._accepts) and spec["datatype"] != "BYTES" and len(spec["shape"]) > 1
        return {"name": spec["name"], "parameters": {"binary_data": True}} if raw else {"name": spec["name"]}

    def _result(self, response: HttpResponse, single: bool | None) -> Result:
        with _understood():
            answer = _read_json(response)
            known = answer["parameters"].get(SINGLE)
            return Result(
                model=f"{answer['model_name']}:{answer['model_version']}",
                outputs=decode_outputs(answer["outputs"], single if single is not None else known, self._show),
                report=msgspec.convert(answer["parameters"], RunReport),
                single=known,
            )


def _resendable(request: Request) -> Request:
    """The request with an idempotency key, so that it can be sent again if no answer came and is still one job."""
    return request if request.idempotency_key else msgspec.structs.replace(request, idempotency_key=new_id())


def _retry_pause(response: HttpResponse) -> float | None:
    """Seconds, with jitter, after which a rate-limited request may be retried; None for any other answer."""
    if response.status != HTTPStatus.TOO_MANY_REQUESTS:
        return None
    try:
        _read_json(response)
    except RateLimitedError as error:
        return (error.retry_after or 0.0) + random.uniform(0, _SPREAD)
    except TaxiwayError:
        pass
    return None


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """Around reading an answer: what a router would not send is an error of the fleet."""
    try:
        yield
    except _MALFORMED as error:
        raise FleetUnavailable(f"expected an answer of taxiway, got another one: {cut(str(error))}") from error


def _job_of(response: HttpResponse) -> str:
    """The id of the job in an answer."""
    with _understood():
        return str(uuid.UUID(_read_json(response)["id"]))


def _job_path(job: str) -> str:
    return f"/v2/jobs/{quote(job, safe='')}"


def _timeout_error(timeout: float | None) -> ResultTimeoutError:
    return ResultTimeoutError(f"no result within {timeout:g} s; the job continues", timeout=timeout)


def _read_json(response: HttpResponse) -> dict[str, Any]:
    """The response's JSON, its tensors with the data that follows it.

    Raises:
        TaxiwayError: the error in the response, in its own class.
    """
    with _understood():
        text, rest = split(response.body, response.headers.get(HEADER))
        try:
            answer = msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise _not_a_router(response) from error
        if response.ok:
            return {**answer, "outputs": placed(answer["outputs"], rest)} if rest else answer
        reported = answer.get("error")
        if isinstance(reported, dict):  # the form of OpenAI's API
            said = str(reported.get("message", ""))
            ours = error_of_code(str(reported.get("code")), said, {"status": response.status})
            raise ours if type(ours) is not TaxiwayError else _error_class_of(response)(said, status=response.status)
        if "code" not in answer:
            raise _not_a_router(response)
        details = dict(answer.get("details") or {})
        if "retry-after" in response.headers:
            details.setdefault("retry_after", float(response.headers["retry-after"]))
        if "retry_after" in details:
            details["retry_after"] = float(details["retry_after"])
        raise error_of_code(str(answer["code"]), str(answer.get("error", "")), details)


def _not_a_router(response: HttpResponse) -> TaxiwayError:
    """The error for a response that did not come from a router, but from a proxy or another server."""
    message = f"expected a response of taxiway, got status {response.status} from another server"
    return _error_class_of(response)(message, status=response.status)


def _error_class_of(response: HttpResponse) -> type[TaxiwayError]:
    theirs = HTTPStatus.BAD_REQUEST <= response.status < HTTPStatus.INTERNAL_SERVER_ERROR
    return RequestError if theirs else FleetUnavailable

"""The door at http://: the Open Inference Protocol v2 and the jobs behind it."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from taxiway.client.door import Receipt
from taxiway.client.tensors import decode_outputs, encode_inputs
from taxiway.errors import (
    BrokerUnavailableError,
    FleetUnavailable,
    RequestError,
    ResultTimeoutError,
    TaxiwayError,
    error_of_code,
)
from taxiway.job import JobRecord, JobStatus, Result, RunReport
from taxiway.request import TERMS, Request

LONGEST_WAIT = 20.0
"""Seconds of one long poll: shorter than the idle time-outs of common proxies (30 to 60 s)."""

_PAUSE = 0.05
"""Seconds before connecting again, and the least that a long poll takes."""

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_JSON = {"content-type": "application/json"}


def open_url(url: str, patience: float) -> HttpDoor:
    """The door at `url`."""
    return HttpDoor(url, patience)


class HttpDoor:
    """Requests to a router. A model's metadata is fetched once, to give plain inputs their names and datatypes."""

    def __init__(self, url: str, patience: float) -> None:
        parts = urlsplit(url)
        self._url = url
        self._patience = patience
        self._client = httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(None, connect=patience),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),  # as many as there are calls
            verify=parts.scheme == "https",
            trust_env=parts.hostname not in _LOOPBACK,
        )
        self._specs: dict[str, list[dict[str, Any]]] = {}
        self._heard = 0.0
        self._checking: asyncio.Task[None] | None = None

    async def submit(self, request: Request) -> Receipt:
        """Accept the request; answered as soon as it is placed."""
        path, body, single = await self._body(request)
        response = await self._ask("POST", f"{path}/infer", content=body, headers={**_JSON, "prefer": "respond-async"})
        return Receipt(_checked(response)["id"], single=single)

    async def infer(self, request: Request, timeout: float | None) -> Result:
        """Submit and wait for the answer in one exchange; a router that would rather not wait gives a job to poll."""
        path, body, single = await self._body(request)
        try:
            async with asyncio.timeout(timeout):
                response = await self._ask("POST", f"{path}/infer", content=body, headers=_JSON)
                if response.status_code != httpx.codes.ACCEPTED:
                    return _result(_checked(response), single)
                return await self.result(Receipt(response.json()["id"], single=single), None)
        except TimeoutError as error:
            raise _too_long(timeout) from error

    async def result(self, receipt: Receipt, timeout: float | None) -> Result:
        """The job's answer, by long polls."""
        clock = asyncio.get_running_loop().time
        until = None if timeout is None else clock() + timeout
        while True:
            asked = clock()
            wait = LONGEST_WAIT if until is None else min(LONGEST_WAIT, max(0.0, until - asked))
            response = await self._ask("GET", f"{_job_path(receipt.job)}/result", params={"wait": f"{wait:.3f}"})
            if response.status_code != httpx.codes.ACCEPTED:
                return _result(_checked(response), receipt.single)
            if until is not None and clock() >= until:
                raise _too_long(timeout)
            await asyncio.sleep(min(wait, _PAUSE) if clock() - asked < min(wait, _PAUSE) else 0)

    async def status(self, job: str) -> JobStatus:
        """Where the job is."""
        fields = _checked(await self._ask("GET", _job_path(job)))
        return JobStatus(
            record=msgspec.convert(fields, JobRecord), position=fields.get("position"), eta=fields.get("eta")
        )

    async def placement(self, job: str) -> dict[str, Any]:
        """Why the job is where it is."""
        return _checked(await self._ask("GET", f"{_job_path(job)}/placement"))

    async def what_if(self, request: Request) -> dict[str, Any]:
        """Where the request would run now and why."""
        path, body, _ = await self._body(request)
        return _checked(await self._ask("POST", f"{path}/placement", content=body, headers=_JSON))

    async def cancel(self, job: str) -> None:
        """Ask that the job does not run."""
        _checked(await self._ask("DELETE", _job_path(job)))

    async def models(self) -> list[dict[str, Any]]:
        """What the fleet can run."""
        answer: Any = _checked(await self._ask("GET", "/v2/models"))
        listed: list[dict[str, Any]] = answer["models"] if isinstance(answer, dict) else answer
        return listed

    async def fleet(self) -> dict[str, Any]:
        """The fleet's classes and devices now."""
        return _checked(await self._ask("GET", "/v2/fleet"))

    async def close(self) -> None:
        """Close all connections."""
        if self._checking is not None:
            self._checking.cancel()
        await self._client.aclose()

    async def _body(self, request: Request) -> tuple[str, bytes, bool]:
        """The model's path, the body of an infer request, and whether its inputs have no batch axis."""
        path = f"/v2/models/{quote(request.model, safe=':@')}"
        if request.model not in self._specs:
            self._specs[request.model] = _checked(await self._ask("GET", path))["inputs"]
        tensors, single = encode_inputs(self._specs[request.model], request.inputs)
        terms = {name: getattr(request, name) for name in TERMS if getattr(request, name) is not None}
        body: dict[str, Any] = {"inputs": tensors, "parameters": {**request.parameters, **terms}}
        if request.outputs:
            body["outputs"] = [{"name": name} for name in request.outputs]
        return path, msgspec.json.encode(body), single

    async def _ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """The response, however long it takes, as long as the router shows that it lives.

        Raises:
            BrokerUnavailableError: it was silent for the patience.
        """
        task = asyncio.create_task(self._connected(method, path, **arguments))
        try:
            while not (await asyncio.wait((task,), timeout=self._patience / 2))[0]:
                await self._see_alive()
            return task.result()
        finally:
            task.cancel()

    async def _see_alive(self) -> None:
        """One look at the router for all calls that wait for it, unless it has answered any of them just now."""
        if asyncio.get_running_loop().time() - self._heard < self._patience / 2:
            return
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())
        await asyncio.shield(self._checking)

    async def _check(self) -> None:
        asked = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._patience / 2):
                await self._connected("GET", "/v2/health/live")
        except TimeoutError as error:
            if self._heard < asked:  # else it answered other calls meanwhile: it is busy, not away
                raise self._away() from error

    async def _connected(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """The response; connecting is tried again for the patience, for then nothing was sent yet."""
        clock = asyncio.get_running_loop().time
        until = clock() + self._patience
        while True:
            try:
                response = await self._client.request(method, path, **arguments)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if clock() + _PAUSE >= until:
                    raise self._away() from error
                await asyncio.sleep(_PAUSE)
            except httpx.TransportError as error:
                raise self._away() from error
            else:
                self._heard = clock()
                return response

    def _away(self) -> BrokerUnavailableError:
        return BrokerUnavailableError(f"the router at {self._url} does not answer")


def _job_path(job: str) -> str:
    return f"/v2/jobs/{quote(job, safe='')}"


def _too_long(timeout: float | None) -> ResultTimeoutError:
    return ResultTimeoutError(f"no result within {timeout:g} s; the job goes on", timeout=timeout)


def _result(answer: dict[str, Any], single: bool | None) -> Result:
    return Result(
        model=f"{answer['model_name']}:{answer['model_version']}",
        outputs=decode_outputs(answer["outputs"], single),
        report=msgspec.convert(answer["parameters"], RunReport),
    )


def _checked(response: httpx.Response) -> dict[str, Any]:
    """The response's JSON.

    Raises:
        TaxiwayError: the error it tells of, of its own class.
    """
    try:
        answer: dict[str, Any] = msgspec.json.decode(response.content)
    except msgspec.DecodeError as error:
        raise _foreign(response) from error
    if response.is_success:
        return answer
    if not isinstance(answer, dict) or "code" not in answer:
        raise _foreign(response)
    details = dict(answer.get("details") or {})
    if "retry-after" in response.headers:
        details.setdefault("retry_after", float(response.headers["retry-after"]))
    raise error_of_code(answer["code"], answer.get("error", ""), details)


def _foreign(response: httpx.Response) -> TaxiwayError:
    """An error for an answer that is not a router's: a proxy's, or another server's."""
    kind = RequestError if response.is_client_error else FleetUnavailable
    return kind(f"{response.url} answered {response.status_code}, which is not taxiway's", status=response.status_code)

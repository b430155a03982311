"""Job arrays: many inputs for one model as one submission, which the fleet works through without its client.

An array is a batch (docs/batch.md) whose lines are infer requests. A router runs a window of them at a time, at a low
level, in turn with other tenants; another one takes over if it dies.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from taxiway.contract.batches import ENDED, BatchAnswer, Line, LineError, OutputLine
from taxiway.contract.job import Result
from taxiway.contract.limits import Buffer
from taxiway.contract.request import TERMS, Request, Terms
from taxiway.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    JobCancelledError,
    ResultTimeoutError,
    TaxiwayError,
    UnknownObjectError,
    invalid,
    wrong_field,
)

if TYPE_CHECKING:
    from taxiway.client import ClientTransport
    from taxiway.client.http_transport import HttpClientTransport

WITHIN = "24h"
"""The time within which an array's members are answered, unless it is given."""

_POLL, _LONGEST_POLL = 0.25, 5.0
"""Seconds between two looks at an array: a tenth of the time since the first look, within these bounds."""

_NO_TERMS = Terms()

_UNFIT = {
    "deadline": "none for an array: `within` bounds all of it",
    "idempotency_key": "none for an array: it would make all members one job",
    "stream": "none for an array: its members are not streamed",
}


class ArrayProgress(msgspec.Struct, frozen=True):
    """How far an array is. `errors` says why it could not begin, and of which inputs, counted from 1."""

    state: str  # as a batch's: validating, in_progress, finalizing, completed, failed, expired, cancelling, cancelled
    members: int  # 0 until they were counted
    completed: int
    failed: int
    errors: Sequence[str] = ()

    @property
    def done(self) -> int:
        """Members that have ended."""
        return self.completed + self.failed

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.state in ENDED


Watch = Callable[[ArrayProgress], object]


def unwatched(_: object) -> None:
    """Ignore progress."""


_decode_batch = msgspec.json.Decoder(BatchAnswer).decode
_decode_ended = msgspec.json.Decoder(OutputLine).decode
_decode_line = msgspec.json.Decoder(Line).decode
_encode = msgspec.json.Encoder().encode


class AsyncJobArray:
    """An array in the fleet. `await array` is `await array.results()`."""

    def __init__(self, transport: HttpClientTransport, id: str, terms: dict[str, Any]) -> None:
        self.id = id
        self._transport = transport
        self._terms = terms

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    def __await__(self) -> Any:
        return self.results().__await__()

    def __aiter__(self) -> AsyncGenerator[Result | TaxiwayError, None]:
        return self.outcomes()

    async def progress(self) -> ArrayProgress:
        """How far it is."""
        return _progress_of(await self._batch())

    async def wait(self, timeout: float | None = None, watch: Watch = unwatched) -> ArrayProgress:
        """Wait until it has ended. `watch` is called with its progress at each look.

        Raises:
            ResultTimeoutError: `timeout` seconds passed; the array goes on.
        """
        async for batch in self._looks(timeout, watch):
            progress = _progress_of(batch)
        return progress

    async def outcomes(
        self, timeout: float | None = None, watch: Watch = unwatched
    ) -> AsyncGenerator[Result | TaxiwayError, None]:
        """Each member's result, or the error that it ended with, in the order of the inputs, as they end.

        They come some seconds late: a second in the first minute, and ten after some minutes.

        Raises:
            InvalidRequestError: it could not begin; the text has the first reason.
            ResultTimeoutError: as `wait`.
        """
        ended: dict[int, OutputLine] = {}
        given = parts = read = 0
        async for batch in self._looks(timeout, watch):
            if batch.status in ENDED:
                _add(ended, await self._lines(batch), given)
            while batch.status not in ENDED and read < _progress_of(batch).done:
                lines = await self._part(parts)
                if not lines:  # it has ended since
                    break
                parts, read = parts + 1, read + len(lines)
                _add(ended, lines, given)
            while given in ended:
                yield self._outcome(ended.pop(given))
                given += 1
        progress = _progress_of(batch)
        if not progress.members:
            raise InvalidRequestError(f"array: {_first_of(progress.errors)}", field="inputs")
        error = JobCancelledError if progress.state == "cancelled" else DeadlineExceededError
        missing = error(f"the array was {progress.state} before this member was answered")
        for number in range(given, progress.members):
            yield self._outcome(ended[number]) if number in ended else missing

    async def results(self, timeout: float | None = None, watch: Watch = unwatched) -> list[Result | TaxiwayError]:
        """All `outcomes`, once it has ended."""
        return [outcome async for outcome in self.outcomes(timeout, watch)]

    async def cancel(self) -> None:
        """Cancel the members that have not ended. Does nothing if it has."""
        if not (await self.progress()).ended:
            await self._transport.exchange("POST", f"/v1/batches/{self.id}/cancel")

    async def retry(self) -> AsyncJobArray:
        """A new array of the members that were not answered; its results are in the order of the inputs, too.

        Raises:
            InvalidRequestError: all were answered, or it has not ended.
        """
        batch = await self._batch()
        if batch.status not in ENDED:
            raise invalid("array", "one that has ended, to retry what failed")
        lines = await self._lines(batch)
        answered = {line.custom_id for line in lines if line.response is not None and line.response.status_code == 200}
        content = await self._transport.exchange("GET", f"/v1/files/{batch.input_file_id}/content")
        again = [line for line in content.splitlines() if _decode_line(line).custom_id not in answered]
        if not again:
            raise invalid("array", "one with members that failed")
        renumbered = [_line(number, batch.endpoint, _decode_line(line).body) for number, line in enumerate(again)]
        return await _create(self._transport, batch.endpoint, renumbered, self._terms, batch.completion_window)

    async def _batch(self) -> BatchAnswer:
        return _decode_batch(await self._transport.exchange("GET", f"/v1/batches/{self.id}"))

    async def _looks(self, timeout: float | None, watch: Watch) -> AsyncIterator[BatchAnswer]:
        """The batch now and then, until it has ended."""
        clock = asyncio.get_running_loop().time
        began = clock()
        while True:
            batch = await self._batch()
            watch(_progress_of(batch))
            yield batch
            if batch.status in ENDED:
                return
            spent = clock() - began
            if timeout is not None and spent >= timeout:
                raise ResultTimeoutError(f"the array has not ended within {timeout:g} s; it goes on", timeout=timeout)
            pause = min(max(spent / 10, _POLL), _LONGEST_POLL)
            await asyncio.sleep(pause if timeout is None else min(pause, timeout - spent))

    async def _part(self, number: int) -> list[OutputLine]:
        """The lines of a part; none if it is gone."""
        try:
            content = await self._transport.exchange("GET", f"/v1/batches/{self.id}/parts/{number}")
        except UnknownObjectError:
            return []
        return [_decode_ended(line) for line in content.splitlines()]

    async def _lines(self, batch: BatchAnswer) -> list[OutputLine]:
        """What became of the members that have ended."""
        files = [file for file in (batch.output_file_id, batch.error_file_id) if file]
        contents = [await self._transport.exchange("GET", f"/v1/files/{file}/content") for file in files]
        return [_decode_ended(line) for content in contents for line in content.splitlines()]

    def _outcome(self, line: OutputLine) -> Result | TaxiwayError:
        if line.response is None:
            return DeadlineExceededError(line.error.message if line.error else "it was not answered in time")
        try:
            return self._transport.line_result(line.response.status_code, bytes(line.response.body))
        except TaxiwayError as error:
            return error


def _progress_of(batch: BatchAnswer) -> ArrayProgress:
    errors = tuple(map(_told, batch.errors.data)) if batch.errors else ()
    counts = batch.request_counts
    return ArrayProgress(batch.status, counts.total, counts.completed, counts.failed, errors)


def _told(error: LineError) -> str:
    return error.message if error.line is None else f"input {error.line}: {error.message}"


def _first_of(errors: Sequence[str]) -> str:
    more = f"; {len(errors) - 1} more are wrong" if len(errors) > 1 else ""
    return f"{next(iter(errors), 'it has no members')}{more}"


def _add(ended: dict[int, OutputLine], lines: Iterable[OutputLine], given: int) -> None:
    """Add lines by their members' numbers, from `given` on."""
    ended.update((number, line) for line in lines if (number := int(line.custom_id)) >= given)


async def submit_array(
    transport: ClientTransport, requests: Callable[[Any], Request], inputs: Iterable[Any], within: str
) -> AsyncJobArray:
    """Submit the requests for all inputs as one array.

    Raises:
        InvalidRequestError: there are none; or the address is a broker's.
        TaxiwayError: as `AsyncClient.submit` raises it.
    """
    from taxiway.client.http_transport import HttpClientTransport  # here, as only it needs aiohttp

    if not isinstance(transport, HttpClientTransport):
        message = "array: expected an http:// or https:// address of a router, which keeps the array"
        raise InvalidRequestError(message, field="url")
    lines, endpoint, terms = [], "", dict[str, Any]()
    for number, value in enumerate(inputs):
        request = requests(value)
        terms = {name: given for name in TERMS if (given := getattr(request, name)) != getattr(_NO_TERMS, name)}
        for name in terms.keys() & _UNFIT.keys():
            raise wrong_field(name, _UNFIT[name], terms[name])
        plain = {name: getattr(_NO_TERMS, name) for name in terms}
        path, body = await transport.infer_line(msgspec.structs.replace(request, **plain))
        endpoint = f"{path}/infer"
        lines.append(_line(number, endpoint, body))
    if not lines:
        raise invalid("inputs", "at least one")
    return await _create(transport, endpoint, lines, terms, within)


def _line(number: int, endpoint: str, body: Buffer) -> bytes:
    return _encode(Line(str(number), "POST", endpoint, msgspec.Raw(body))) + b"\n"


async def _create(
    transport: HttpClientTransport, endpoint: str, lines: Sequence[bytes], terms: dict[str, Any], within: str
) -> AsyncJobArray:
    boundary = uuid.uuid4().hex
    field = f'--{boundary}\r\nContent-Disposition: form-data; name="{{}}"\r\n\r\n'
    head = field.format("purpose") + "batch\r\n" + field.format('file"; filename="array.jsonl')
    body = [head.encode(), b"".join(lines), f"\r\n--{boundary}--\r\n".encode()]
    file = await transport.exchange("POST", "/v1/files", body, f"multipart/form-data; boundary={boundary}")
    wanted = {
        "input_file_id": msgspec.json.decode(file)["id"],
        "endpoint": endpoint,
        "completion_window": within,
        **terms,
    }
    made = await transport.exchange("POST", "/v1/batches", [_encode(wanted)], "application/json")
    return AsyncJobArray(transport, msgspec.json.decode(made)["id"], terms)

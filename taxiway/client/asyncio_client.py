"""The client for asyncio: the one implementation, over any door."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Collection, Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import msgspec

from taxiway.client.dead import DeadLetters
from taxiway.client.door import Door, Receipt, open_door
from taxiway.client.mapping import Ask, Progress, as_they_come, in_order, unheard
from taxiway.client.tensors import array, plain
from taxiway.contract.durability import Durability
from taxiway.contract.job import FINAL, JobStatus, Result
from taxiway.contract.listing import USUAL, JobFilter, JobPage, states_of
from taxiway.contract.request import Request, check_content, parse_request
from taxiway.contract.streaming import Told
from taxiway.errors import InvalidRequestError, JobError, RequestError

CONNECT_TIMEOUT = 1.5
"""Seconds that a call tries while nobody answers: it has failed within 2 s, whatever else is slow."""

WINDOW = 256
"""Requests of a `map` under way at once."""


class Options(TypedDict, total=False):
    """What a request may say beyond its model and inputs. None means not said.

    `parameters` are the model's own, `outputs` the names wanted; the others are service terms (`request.Terms`).
    """

    parameters: Mapping[str, Any] | None
    outputs: Sequence[str] | None
    deadline: float | None
    service: str | None
    priority: str | None
    budget: float | None
    tenant: str | None
    locality: str | None
    min_accuracy: float | None
    idempotency_key: str | None
    stream: bool | None


class AsyncJob:
    """A job in the fleet. `await job` is `await job.result()`."""

    def __init__(self, door: Door, receipt: Receipt) -> None:
        self._door = door
        self._receipt = receipt

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    def __await__(self) -> Generator[Any, None, Result]:
        return self.result().__await__()

    @property
    def id(self) -> str:
        """The job's id, the same at every door."""
        return self._receipt.job

    async def result(self, timeout: float | None = None) -> Result:
        """The answer; told at once when it is there, and as often as it is asked for.

        With `timeout` it waits so many seconds, through outages too. Without, it waits as long as the fleet answers.

        Raises:
            JobError, RequestError: what the job ended with, of its own class.
            ResultTimeoutError: `timeout` passed; the job goes on.
            BrokerUnavailableError: nobody answers; the job goes on where it is, and may be asked for again.
        """
        return await self._door.result(self._receipt, timeout)

    def stream(self, timeout: float | None = None) -> Told:
        """A generated answer as it comes, for a request with the option `stream`; of others only the result.

        Yields text in pieces, and at last the result, which is always whole. Between them `Restarted` says that the
        text begins anew, and `Lost` how many characters a reader missed who was too slow or came too late.
        Raises as `result` does.
        """
        return self._door.stream(self._receipt, timeout)

    async def status(self) -> JobStatus:
        """Where the job is now; position and estimated end are known at the HTTP door only."""
        return await self._door.status(self._receipt)

    async def placement(self) -> dict[str, Any]:
        """Why the job runs where it does: `reason`, and the figures it was decided from."""
        return await self._door.placement(self._receipt)

    async def done(self) -> bool:
        """Whether the job has ended, in whatever way."""
        if self._receipt.reply is not None and self._receipt.reply.done():
            return True
        return (await self.status()).record.state in FINAL

    async def cancel(self) -> None:
        """Ask that the job does not run. One that runs already may still succeed."""
        await self._door.cancel(self._receipt)


class AsyncClient:
    """A client for one event loop.

    It connects when it is first used. Not for use after a fork: make a new one in the child.

    Args:
        url: `redis://`, `rediss://` or `unix://` (the broker, fastest), or `http(s)://` (a router).
        key: the caller's at a router; its tenant is the key's. It goes out as a header, never in an address or a log.
            At a broker the producers' signing key, in hexadecimal digits: it never goes out.
        connect_timeout: seconds that each call tries while nobody answers, before it raises `BrokerUnavailableError`.
        arrays: whether tensors in results are numpy arrays, read-only and not copied, instead of nested lists.
        durability: when a submit to a broker returns: once it is `written`, or once a replica has it, too:
            `replicated`. At a router its `limits.durability` says so.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        connect_timeout: float = CONNECT_TIMEOUT,
        arrays: bool = False,
        durability: Durability = "written",
    ) -> None:
        show = array if arrays else plain
        self._opened = open_door(url, patience=connect_timeout, show=show, key=key, durability=durability)
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _door(self) -> Door:
        if self._closed:
            raise RuntimeError("this client is closed")
        return self._opened

    async def submit(self, model: str, inputs: Any, **options: Unpack[Options]) -> AsyncJob:
        """Hand in a request: it is durable when this returns.

        Args:
            model: `sentiment`, `sentiment:2` or `sentiment@stable`.
            inputs: a plain value where the model has one input, a mapping by name, or a list of OIP tensors. Values are
                str, bytes, numbers, numpy arrays, and lists of these, whose first axis is the batch.
            options: see `Options`.

        Raises:
            RequestError: a term is wrong. What only a router can tell is raised by the result (at the HTTP door, here).
            FleetUnavailable: nobody takes it.
        """
        door = self._door
        return AsyncJob(door, await door.submit(_request(model, inputs, options)))

    async def infer(
        self, model: str, inputs: Any, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Result:
        """Submit and wait for the answer, at most `timeout` seconds. Raises as `submit` and `AsyncJob.result` do."""
        return await self._door.infer(_request(model, inputs, options), timeout)

    async def stream(
        self, model: str, inputs: Any, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Told:
        """Submit, and follow the answer as it is generated: see `AsyncJob.stream`. The job does not need a reader."""
        options["stream"] = True
        job = await self.submit(model, inputs, **options)
        async with contextlib.aclosing(job.stream(timeout)) as told:
            async for event in told:
                yield event

    async def map(
        self,
        model: str,
        inputs: Iterable[Any] | AsyncIterable[Any],
        *,
        window: int = WINDOW,
        timeout: float | None = None,
        progress: Progress = unheard,
        **options: Unpack[Options],
    ) -> AsyncIterator[Result]:
        """The answer to each of `inputs`, in their order, with at most `window` requests under way.

        The first that fails raises, when its turn comes; what is under way then is not waited for, and still runs.
        `timeout` holds for each request; `progress` is told after each answer how many there were.
        """
        ask = self.asker(model, timeout, options)
        async with contextlib.aclosing(in_order(ask, inputs, window, progress)) as answers:
            async for answer in answers:
                yield answer

    async def map_as_completed(
        self,
        model: str,
        inputs: Iterable[Any] | AsyncIterable[Any],
        *,
        window: int = WINDOW,
        timeout: float | None = None,
        progress: Progress = unheard,
        **options: Unpack[Options],
    ) -> AsyncIterator[tuple[int, Result]]:
        """As `map`, but each answer as soon as it is there, with the place of its input, from 0."""
        ask = self.asker(model, timeout, options)
        async with contextlib.aclosing(as_they_come(ask, inputs, window, progress)) as answers:
            async for answer in answers:
                yield answer

    def asker(self, model: str, timeout: float | None, options: Options) -> Ask:
        """Asks for the answers to many inputs, which share all else.

        Raises:
            InvalidRequestError: a term is wrong, or is an idempotency key: many requests would be one job.
        """
        if options.get("idempotency_key") is not None:
            raise InvalidRequestError(
                "idempotency_key: expected none for a map of many requests", field="idempotency_key"
            )
        door, alike = self._door, _request(model, "", options)

        async def ask(inputs: Any) -> Result:
            if inputs is None:
                raise InvalidRequestError("inputs: expected a value, got nothing", field="inputs")
            request = msgspec.structs.replace(alike, inputs=inputs)
            check_content(request)
            return await door.infer(request, timeout)

        return ask

    async def as_completed(self, jobs: Iterable[AsyncJob]) -> AsyncIterator[AsyncJob]:
        """The jobs in the order in which they end; each one's `result()` is there at once."""
        waiting = {asyncio.create_task(ended(job)): job for job in jobs}
        try:
            while waiting:
                ended, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    yield waiting.pop(task)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    @property
    def dead(self) -> DeadLetters:
        """The messages that the fleet gave up, for operators."""
        return DeadLetters(self._door)

    def job(self, id: str) -> AsyncJob:
        """The job of that id, whoever submitted it; nothing is asked of the fleet yet."""
        return AsyncJob(self._door, Receipt(id))

    async def what_if(self, model: str, inputs: Any, **options: Unpack[Options]) -> dict[str, Any]:
        """Where a request would run now, why, and what else was considered; nothing is submitted. HTTP only.

        A request that could not be placed is no error: `error` is its code and `reason` says why.

        Raises:
            InvalidRequestError: a term or an input is wrong, or the door is not HTTP.
        """
        return await self._door.what_if(_request(model, inputs, options))

    async def jobs(
        self, *, states: Collection[str] = (), model: str = "", tenant: str = "", limit: int = USUAL, cursor: str = ""
    ) -> JobPage:
        """A page of the fleet's jobs, the latest accepted first; `next` of it is the `cursor` of the one after it.

        `states` are names of job states, `model` is `name` or `name:version`; what is left out filters nothing. Jobs
        that wait in the arrivals are not listed. A page may have fewer jobs than `limit`, or none, and still a `next`.

        Raises:
            InvalidRequestError: a state, the limit or the cursor is none.
        """
        wanted = JobFilter(states=states_of(states), model=model, tenant=tenant)
        return await self._door.jobs(wanted, limit, cursor)

    async def models(self) -> list[dict[str, Any]]:
        """What the fleet can run: names, versions, aliases, variants."""
        return await self._door.models()

    async def fleet(self) -> dict[str, Any]:
        """The fleet's hardware classes and devices now. HTTP only, else `InvalidRequestError`."""
        return await self._door.fleet()

    async def reload(self) -> list[dict[str, Any]]:
        """Have every router and worker look at its models folder now; what each of them serves then.

        Per process: `process`, `kind`, whether it `answered` in time, its `models`, which of them were `added`,
        `replaced` or `removed`, which are `disabled` or `outdated` and why, and whether `queues_changed` since it
        started. HTTP only, else `InvalidRequestError`.
        """
        processes: list[dict[str, Any]] = (await self._door.administer("POST", "/v2/reload"))["processes"]
        return processes

    async def close(self) -> None:
        """Let go of all connections; jobs go on. Closing twice does nothing."""
        if not self._closed:
            self._closed = True
            await self._opened.close()


def _request(model: str, inputs: Any, options: Options) -> Request:
    said = {name: value for name, value in options.items() if value is not None}
    return parse_request({"model": model, "inputs": inputs, **said})


async def ended(job: AsyncJob) -> None:
    """Returns when the job has ended, in whatever way; raises only what `result` raises of the fleet."""
    try:
        await job.result()
    except (JobError, RequestError):
        return

"""The interfaces that producers use: taxiway's client at the broker and at routers, and plain Celery."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import celery
import kombu.exceptions
import redis.exceptions
from celery.states import READY_STATES

import taxiway
from taxiway.contract.job import Result, ResultMeta, read_result
from taxiway.contract.keys import ARRIVALS, CANCEL, INFER
from taxiway.contract.request import new_id
from taxiway.contract.wire import Durability
from taxiway.errors import BrokerUnavailableError, ResultTimeoutError, error_from
from tests.chaos.workload import JobSpec
from tests.producing import QUORUM

_AWAY = (kombu.exceptions.OperationalError, redis.exceptions.RedisError, OSError)
_POLL = (0.2, 3.0)  # seconds between two polls of plain Celery for a result: the first and the longest


class AcceptedJob(Protocol):
    """A job that an interface accepted; `taxiway.AsyncJob` is one."""

    @property
    def id(self) -> str:
        """The job's id."""

    async def result(self, timeout: float | None = None) -> Result:
        """The result, or raises the error that the job ended with."""

    async def cancel(self) -> object:
        """Cancel the job."""


class Interface(Protocol):
    """A way into the fleet."""

    replicated: bool

    async def submit(self, spec: JobSpec) -> AcceptedJob:
        """Submit the job."""

    async def close(self) -> None:
        """Disconnect."""


class ClientInterface:
    """taxiway's client, at a broker or a router."""

    def __init__(self, url: str, durability: Durability = "written") -> None:
        self.replicated = durability == "replicated"
        self.client = taxiway.AsyncClient(url, durability=durability)

    async def submit(self, spec: JobSpec) -> AcceptedJob:
        """Submit the job."""
        deadline, key = spec.deadline or None, spec.key or None
        return await self.client.submit(spec.model, spec.number, deadline=deadline, idempotency_key=key)

    async def close(self) -> None:
        """Disconnect."""
        await self.client.close()


class CeleryInterface:
    """Celery without taxiway, on its own threads."""

    replicated = False

    def __init__(self, broker: str, state: str) -> None:
        self._app = celery.Celery("producer", broker=broker, backend=state, set_as_current=False)
        confirmed = {"confirm_publish": True} if broker.startswith("amqp") else {}
        quick = {"socket_timeout": 2, "socket_connect_timeout": 2, "max_retries": 1, **confirmed}
        self._app.conf.update(broker_transport_options=quick, broker_connection_timeout=2, redis_socket_timeout=2)
        self._app.conf.task_queues = [QUORUM if confirmed else kombu.Queue(ARRIVALS)]
        self._bridged = bool(confirmed)
        self._senders, self._readers = ThreadPoolExecutor(4, "celery-send"), ThreadPoolExecutor(4, "celery-read")

    async def submit(self, spec: JobSpec) -> AcceptedJob:
        """Submit the job."""
        kwargs = {"model": spec.model, "inputs": spec.number, **({"deadline": spec.deadline} if spec.deadline else {})}
        job = new_id()
        try:
            await _in_thread(self._senders, lambda: self._send(job, kwargs))
        except _AWAY as error:
            raise BrokerUnavailableError(f"Celery: {error}") from error
        return _CeleryJob(self, job)

    async def cancel(self, job: str) -> None:
        """Revoke the job, as Celery does; no revocation goes through RabbitMQ, so there it is cancelled."""
        cancel = partial(self._app.send_task, CANCEL, args=[job], queue=ARRIVALS, retry=False)
        try:
            await _in_thread(self._senders, cancel if self._bridged else partial(self._app.control.revoke, job))
        except _AWAY as error:
            raise BrokerUnavailableError(f"Celery: {error}") from error

    async def read(self, job: str) -> ResultMeta | None:
        """An ended job's result from Celery's backend; None if it has none."""
        found: ResultMeta | None = await _in_thread(self._readers, lambda: self._read(job))
        return found

    async def close(self) -> None:
        """Disconnect."""
        for threads in (self._senders, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)
        self._app.close()

    def _send(self, job: str, kwargs: dict[str, Any]) -> None:
        self._app.send_task(INFER, task_id=job, kwargs=kwargs, queue=ARRIVALS, retry=False, ignore_result=True)

    def _read(self, job: str) -> ResultMeta | None:
        backend = self._app.backend
        try:
            meta = backend.get_task_meta(job, cache=False)
        except _AWAY:
            return None
        if meta["status"] not in READY_STATES:
            return None
        return ResultMeta(task_id=job, status=meta["status"], result=_plain(meta["result"]))


@dataclass(frozen=True, slots=True)
class _CeleryJob:
    """A job submitted by plain Celery."""

    interface: CeleryInterface
    id: str

    async def result(self, timeout: float | None = None) -> Result:
        """The result, by polling."""
        assert timeout is not None
        until = time.monotonic() + timeout
        pause, longest = _POLL
        while (meta := await self.interface.read(self.id)) is None:
            if time.monotonic() > until:
                raise ResultTimeoutError("Celery has no result")
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)
        return read_result(meta)

    async def cancel(self) -> None:
        """Revoke the job."""
        await self.interface.cancel(self.id)


async def _in_thread(threads: ThreadPoolExecutor, call: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(threads, call)


def _plain(result: Any) -> Any:
    """A result as it is stored: Celery turns a failure into an exception."""
    if not isinstance(result, Exception):
        return result
    named = error_from(type(result).__name__, str(result))
    return {"exc_type": type(named).__name__, "exc_message": [named.message]}

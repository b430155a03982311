"""The doors that producers use: taxiway's client at the broker and at routers, and plain Celery."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import celery
import kombu.exceptions
import redis.exceptions
from celery.states import READY_STATES

import taxiway
from taxiway.contract.durability import Durability
from taxiway.contract.job import Result, ResultMeta, read_result
from taxiway.contract.keys import ARRIVALS, INFER
from taxiway.contract.request import job_id, parse_request
from taxiway.errors import BrokerUnavailableError, ResultTimeoutError, error_from
from tests.chaos.wishes import Wish

_AWAY = (kombu.exceptions.OperationalError, redis.exceptions.RedisError, OSError)
_POLL = (0.2, 3.0)  # seconds between two looks of plain Celery for a result, at first and at most


class Asked(Protocol):
    """A job that a door accepted; `taxiway.AsyncJob` is one."""

    @property
    def id(self) -> str:
        """The job's id."""

    async def result(self, timeout: float | None = None) -> Result:
        """The answer, or the error that the job ended with."""

    async def cancel(self) -> None:
        """Ask that it does not run."""


class Door(Protocol):
    """A way into the fleet."""

    replicated: bool

    async def submit(self, wish: Wish) -> Asked:
        """Ask for the job."""

    async def close(self) -> None:
        """Disconnect."""


class ClientDoor:
    """taxiway's client, at a broker or a router."""

    def __init__(self, url: str, durability: Durability = "written") -> None:
        self.replicated = durability == "replicated"
        self.client = taxiway.AsyncClient(url, durability=durability)

    async def submit(self, wish: Wish) -> Asked:
        """Ask for the job."""
        deadline, key = wish.deadline or None, wish.key or None
        return await self.client.submit(wish.model, wish.number, deadline=deadline, idempotency_key=key)

    async def close(self) -> None:
        """Disconnect."""
        await self.client.close()


class CeleryDoor:
    """Celery without taxiway, on threads of its own; a key is both the job's and its message's."""

    replicated = False

    def __init__(self, broker: str, state: str) -> None:
        self._app = celery.Celery("producer", broker=broker, backend=state, set_as_current=False)
        confirmed = {"confirm_publish": True} if broker.startswith("amqp") else {}
        quick = {"socket_timeout": 2, "socket_connect_timeout": 2, "max_retries": 1, **confirmed}
        self._app.conf.update(broker_transport_options=quick, broker_connection_timeout=2, redis_socket_timeout=2)
        self._app.conf.task_queues = [kombu.Queue(ARRIVALS)]
        self._senders, self._readers = ThreadPoolExecutor(4, "celery-send"), ThreadPoolExecutor(4, "celery-read")

    async def submit(self, wish: Wish) -> Asked:
        """Ask for the job."""
        asked = {"model": wish.model, "inputs": wish.number}
        terms = {"deadline": wish.deadline, "idempotency_key": wish.key}
        asked |= {name: value for name, value in terms.items() if value}
        job = job_id(parse_request(asked))
        try:
            await _in_thread(self._senders, lambda: self._send(job, asked))
        except _AWAY as error:
            raise BrokerUnavailableError(f"Celery: {error}") from error
        return _CeleryJob(self, job)

    async def cancel(self, job: str) -> None:
        """Revoke the job, as Celery does."""
        await _in_thread(self._senders, lambda: self._app.control.revoke(job))

    async def read(self, job: str) -> ResultMeta | None:
        """What Celery's backend has of an ended job."""
        found: ResultMeta | None = await _in_thread(self._readers, lambda: self._read(job))
        return found

    async def close(self) -> None:
        """Disconnect."""
        for threads in (self._senders, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)
        self._app.close()

    def _send(self, job: str, asked: dict[str, Any]) -> None:
        self._app.send_task(INFER, task_id=job, kwargs=asked, queue=ARRIVALS, retry=False, ignore_result=True)

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
    """A job of plain Celery's."""

    door: CeleryDoor
    id: str

    async def result(self, timeout: float | None = None) -> Result:
        """The answer, asked for again and again."""
        assert timeout is not None
        until = time.monotonic() + timeout
        pause, longest = _POLL
        while (meta := await self.door.read(self.id)) is None:
            if time.monotonic() > until:
                raise ResultTimeoutError("Celery was told nothing")
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)
        return read_result(meta)

    async def cancel(self) -> None:
        """Revoke it."""
        await self.door.cancel(self.id)


async def _in_thread(threads: ThreadPoolExecutor, call: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(threads, call)


def _plain(result: Any) -> Any:
    """A result as it is stored; Celery makes an exception of a failure."""
    if not isinstance(result, Exception):
        return result
    named = error_from(type(result).__name__, str(result))
    return {"exc_type": type(named).__name__, "exc_message": [named.message]}

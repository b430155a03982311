"""How each contestant is called: taxiway by its client, Celery by its own, servers over HTTP. See `load.Ask`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import numpy as np
from celery import exceptions

import taxiway
from benchmarks.suite.http_caller import HttpCaller
from benchmarks.suite.peers.celery import plain_app
from benchmarks.suite.workloads import Plan, payloads, row_of
from taxiway.errors import TaxiwayError

_PATIENCE = 90.0  # seconds for one answer


class Caller(Protocol):
    """Sends requests to one contestant; an asynchronous context manager."""

    async def __aenter__(self) -> Caller:
        """Connect."""

    async def __aexit__(self, *_: object) -> None:
        """Disconnect."""

    async def ask(self, number: int) -> float:
        """The items in the answer to request `number`. Raises `OSError`, `ValueError` or `RuntimeError`."""

    async def alone(self, number: int) -> float:
        """The same for a caller with a single request at a time."""


class ClientCaller:
    """taxiway's asyncio client, through arrivals and router. Arrays are sent as numpy arrays."""

    def __init__(self, plan: Plan, broker: str) -> None:
        self._client = taxiway.AsyncClient(broker)
        self._model = plan.workload.model
        rows = (row_of(plan.workload, payload) for payload in payloads(plan))
        self._inputs = [{name: _array(value) for name, value in row.items()} for row in rows]

    async def __aenter__(self) -> ClientCaller:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, number: int) -> float:
        """See `Caller`."""
        inputs = self._inputs[number % len(self._inputs)]
        try:
            await self._client.infer(self._model, inputs, timeout=_PATIENCE)
        except TaxiwayError as error:
            raise RuntimeError(str(error)) from error
        return 1.0

    async def alone(self, number: int) -> float:
        """See `Caller`."""
        return await self.ask(number)


class CeleryCaller:
    """Plain Celery's client: `apply_async`, with results from its one subscription.

    A single request is `delay().get()`. Under saturation one thread sends and receives, as fast as Celery's client can.
    """

    def __init__(self, plan: Plan, broker: str, task: str) -> None:
        self._app = plain_app(broker=broker, backend=broker)
        self._task = self._app.tasks[task]
        self._payloads = payloads(plan)
        self._results: Any = vars(self._app.backend)["result_consumer"]  # Redis's backend has one
        self._connection: Any = None

    async def __aenter__(self) -> CeleryCaller:
        await self.alone(0)  # loads the model and subscribes
        self._connection = self._results._pubsub.connection
        asyncio.get_running_loop().add_reader(self._connection._sock, self._receive)
        return self

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._connection._sock)
        self._results.stop()
        self._app.close()

    async def ask(self, number: int) -> float:
        """See `Caller`."""
        answered = asyncio.get_running_loop().create_future()
        result = self._task.apply_async((self._payloads[number % len(self._payloads)],))
        result.then(answered.set_result, on_error=answered.set_result)
        await answered
        if not result.successful():
            raise RuntimeError(f"the task failed: {result.result!r}")
        return 1.0

    async def alone(self, number: int) -> float:
        """See `Caller`. Raises `TimeoutError`."""
        result = self._task.delay(self._payloads[number % len(self._payloads)])
        try:
            result.get(timeout=_PATIENCE)
            return 1.0
        except exceptions.TimeoutError as error:  # Celery's own class
            raise TimeoutError(f"no result within {_PATIENCE:g} s") from error

    def _receive(self) -> None:
        while self._connection.can_read(timeout=0):
            self._results.drain_events(timeout=0)


def interface_caller(plan: Plan, http: str) -> HttpCaller:
    """The HTTP API, with the Open Inference Protocol in JSON."""
    bodies = [oip_body(plan, payload) for payload in payloads(plan)]
    return HttpCaller(
        port=int(http.rpartition(":")[2]),
        path=f"/v2/models/{plan.workload.model}/infer",
        bodies=bodies,
        kind="application/json",
    )


def peer_caller(plan: Plan, path: str, body: Callable[[Any], bytes]) -> HttpCaller:
    """A peer's server; `body` encodes a payload for it."""
    bodies = [body(payload) for payload in payloads(plan)]
    kind = "image/jpeg" if bodies[0][:2] == b"\xff\xd8" else "application/json"
    return HttpCaller(port=plan.port, path=path, bodies=bodies, kind=kind)


def oip_body(plan: Plan, payload: Any) -> bytes:
    """An infer request for one row."""
    inputs = [_oip_tensor(name, value) for name, value in row_of(plan.workload, payload).items()]
    return msgspec.json.encode({"inputs": inputs})


def _oip_tensor(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        return {"name": name, "shape": [1, len(value)], "datatype": "INT64", "data": value}
    tensor = {"name": name, "shape": [1], "datatype": "BYTES", "data": [value]}  # msgspec writes bytes as base64
    return tensor | {"parameters": {"content_type": "base64"}} if isinstance(value, bytes) else tensor


def _array(value: Any) -> Any:
    return np.array(value, np.int64) if isinstance(value, list) else value

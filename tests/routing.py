"""A router as a real process, and the smallest worker that can stand behind it: one thread of scripts that echoes."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import redis

from broker.valkey import run
from broker.valkey.jobs import Ending, Verdict, claim_answer, claim_call, finish_call
from broker.valkey.processes import heartbeat_call
from tasks.settings import Settings
from tasks.ticket import read_ticket
from taxiway.contract.job import JobState, Result, success_meta
from taxiway.contract.keys import blob_key, priority_lists
from taxiway.contract.values import references, resolved, to_wire
from taxiway.contract.wire import HEADER, decode_envelope, read_request
from tests.builders import a_device, a_report
from tests.forked import Process, running
from tests.narrowing import as_bytes

CLASSES = ("cpu.batch", "gpu.realtime", "tpu.bulk")

HTTP = httpx.Client(timeout=30, trust_env=False, verify=False, limits=httpx.Limits(max_keepalive_connections=0))
"""Asks any server by a connection of its own. Without certificates: to read all of them takes longer than to ask."""


@dataclass(frozen=True)
class RouterProcess:
    """A running `python -m api`."""

    process: Process
    http: str


@contextmanager
def router_process(
    settings: Settings,
    log: Any = None,
    options: Sequence[str] = (),
    *,
    module: str = "api",
    environment: Mapping[str, str] | None = None,
) -> Iterator[RouterProcess]:
    """A router that is ready; killed at the end if the test did not stop it. `module` is its command."""
    variables = {**os.environ, **settings.environment(), **(environment or {})}
    with running("router", module, ["--port", "0", *options], variables, log) as (process, said):
        yield RouterProcess(process, said["http"])


class EchoDevice:
    """Heartbeats for one device, and echoes what its class queue holds with the claim and finish scripts.

    `answering` False only heartbeats: what is placed stays in the queue.
    """

    def __init__(
        self, settings: Settings, *, hardware_class: str = "cpu.batch", answering: bool = True, memory: int = 2**34
    ) -> None:
        self.hardware_class = hardware_class
        self.done: list[str] = []
        self.unavailable: dict[str, str] = {}
        self._secret = settings.secret
        self._client = redis.Redis.from_url(settings.broker)
        self._name = f"{hardware_class}.{uuid.uuid4().hex[:6]}"
        self._stopping = threading.Event()
        self._answering = answering
        self._memory = memory
        self._resting = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> EchoDevice:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        run(self._client, heartbeat_call(self._name, b""))
        self._client.close()

    def beat(self) -> None:
        """Publish the device's facts."""
        facts = a_device(
            self.hardware_class,
            worker=self._name,
            runtimes=("echo", "python", "onnx"),
            instruction_sets=("avx2", "avx512f", "avx512_vnni"),
            warm=("echo:1/echo",),
            unavailable=self.unavailable,
            memory_total=self._memory,
            memory_free=self._memory,
        )
        run(self._client, heartbeat_call(self._name, msgspec.json.encode(facts)))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Answer nothing meanwhile: what is placed stays in the queue."""
        self._resting.clear()
        self._answering = False
        assert self._resting.wait(60)
        try:
            yield
        finally:
            self._answering = True

    def _run(self) -> None:
        beaten = time.monotonic()
        while not self._stopping.is_set():
            if time.monotonic() - beaten > 0.5:
                self.beat()
                beaten = time.monotonic()
            if not self._answering:
                self._resting.set()
                time.sleep(0.05)
                continue
            popped = self._client.blpop(priority_lists(self.hardware_class), timeout=0.1)
            if popped is not None:
                self._answer(as_bytes(popped[1]))

    def _answer(self, raw: bytes) -> None:
        envelope = decode_envelope(raw)
        ticket = read_ticket(envelope.headers[HEADER], envelope.payload(), self._secret)
        answer = run(self._client, claim_call(self._name, 15.0, [(ticket.job, ticket.deadline_at)]))
        now, (claim,) = claim_answer(answer)
        if claim.verdict != Verdict.RUN:
            return
        inputs = read_request(envelope.payload(), envelope.content_type).inputs
        blobs = {one.ref: as_bytes(self._client.get(blob_key(one.ref))) for one in references(inputs)}
        inputs = resolved(inputs, blobs)
        named = isinstance(inputs, list) and inputs and isinstance(inputs[0], dict) and "datatype" in inputs[0]
        payload = inputs[0]["data"] if named else inputs
        single = isinstance(inputs, dict) and inputs.keys() == {"payload"}
        outputs = {"payload": to_wire(inputs["payload"] if single else payload)}
        variant = ticket.variants[self.hardware_class]
        report = a_report(hardware_class=self.hardware_class, variant=variant, reason=ticket.reason)
        meta = success_meta(ticket.job, Result(model=ticket.model, outputs=outputs, report=report))
        ending = Ending(
            ticket.job,
            JobState.SUCCEEDED,
            meta,
            token=claim.token,
            reply=ticket.reply,
            started=repr(now),
            device="cpu:0",
        )
        self.done.append(ticket.job)  # before a waiter has the result
        run(self._client, finish_call([ending], keep_result=60, keep_record=60))


@dataclass(frozen=True)
class EchoFleet:
    """A router before one device that echoes; `http` asks its HTTP API."""

    settings: Settings
    router: RouterProcess
    device: EchoDevice
    http: httpx.Client

    @property
    def interfaces(self) -> dict[str, str]:
        """The address of each interface that has a client of ours."""
        return {"broker": self.settings.broker, "http": self.router.http}


@contextmanager
def echo_fleet(
    settings: Settings, options: Sequence[str] = (), *, log: Any = None, answering: bool = True
) -> Iterator[EchoFleet]:
    """The fleet, once its router knows its device. `options` are the router's."""
    with (
        EchoDevice(settings, answering=answering) as device,
        router_process(settings, log, options) as router,
        httpx.Client(base_url=router.http, timeout=30, trust_env=False) as http,
    ):
        eventually(lambda: http.get("/v2/health/ready").is_success)
        yield EchoFleet(settings, router, device, http)


def eventually(condition: Callable[[], Any], *, within: float = 60.0) -> Any:
    """The condition's first true answer; fails when it has none within these seconds.

    It is looked at the less often the longer it takes, for looking costs the time that others need to make it true.
    """
    began = time.monotonic()
    while not (found := condition()):
        waited = time.monotonic() - began
        if waited > within:
            raise AssertionError(f"not true within {within:g} s")
        time.sleep(min(0.01 + waited / 20, 0.1))
    return found

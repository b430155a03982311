"""Stage 2: claims jobs in bulk, decodes them and prepares those that may run here.

Jobs from the fetch thread are claimed already. The admit thread claims jobs from Celery's consumer, and jobs that
another worker held at the last attempt. The device thread waits for neither.

A message becomes a job: its ticket is checked, the request read, bound to its model and split into rows.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from broker.valkey.class_queue import FetchedMessage
from broker.valkey.jobs import Claim, Verdict
from broker.valkey.worker_store import insist
from tasks.canvas import read_embed
from tasks.heartbeat import variant_key
from tasks.models.folder import ModelsFolder
from tasks.models.model import Model
from tasks.models.signature import Bound, bind, check_stream
from tasks.models.sizes import clamped
from tasks.queues.sealing import opened_request
from tasks.telemetry import parent_of
from tasks.ticket import TicketError, ticket_for
from tasks.topology import HardwareClass
from taxiway.backoff import Outage
from taxiway.contract.keys import INFER
from taxiway.contract.limits import Buffer
from taxiway.contract.request import Request
from taxiway.contract.sealed import sealed_in
from taxiway.contract.values import Reference, from_wire, may_refer, referred, resolved
from taxiway.contract.wire import TRACEPARENT, TRACESTATE, read_request
from taxiway.errors import (
    UNREADABLE,
    BrokerUnavailableError,
    DeadLetteredError,
    ExecutionError,
    InvalidRequestError,
    ModelUnavailableError,
    SealedError,
    TaxiwayError,
    UnknownModelError,
)
from workers.decide.batcher import bucket_of
from workers.decide.faults import describe
from workers.device import WorkerContext
from workers.learned import DeviceVariants, Loaded
from workers.port import Item
from workers.stages.job import Delivery, Dropped, Ended, Headers, RunningJob, late
from workers.stages.outcomes import WorkerOutcomes
from workers.stages.queues import DeviceQueue, Shared, patient_seconds

if TYPE_CHECKING:
    from taxiway.sealing import SealKeys

logger = logging.getLogger(__name__)

RunAlone = Callable[[RunningJob], bool]

LOOK_AGAIN = 1.0
"""Maximum seconds before the claim of a job that another worker holds is retried."""

MOST_ENDED = 2
"""Workers that a job may have ended before it is given up: the first may have had bad luck."""

_SEED = "seed"


@dataclass(slots=True, eq=False)
class AdmitStage:
    """Admits deliveries to the device."""

    device: DeviceQueue
    """Receives jobs to run."""
    variants: DeviceVariants
    shared: Shared
    context: WorkerContext
    shutdown: threading.Event
    """Set when the worker stops; jobs whose blobs cannot be read then return to their queue."""
    counters: WorkerOutcomes
    """Count jobs whose sealed inputs cannot be opened."""
    _reader: JobReader = field(init=False)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        context = self.context
        self._reader = JobReader(context.folder, context.topology.hardware, self._fetch, context.seal_keys)

    def stop(self) -> None:
        """End after the queued deliveries. Thread-safe."""
        self._stopping.set()
        self.shared.admissions.close()

    def run(self) -> None:
        """Claim and admit due deliveries, until stopped."""
        while not self._stopping.is_set():
            due = self.shared.admissions.take()
            if due:
                claimed = [delivery for delivery in due if delivery.token and not delivery.lost]
                self._admit(claimed, time.monotonic())  # they run again
                with contextlib.suppress(BrokerUnavailableError):  # stopping: the messages will be redelivered
                    self._claim([delivery for delivery in due if delivery.lost or not delivery.token])
        self.shared.held.requeue(self.shared.admissions.rest())

    def admit(self, deliveries: Sequence[Delivery], now: float, alone: RunAlone | None = None) -> None:
        """Admit deliveries according to their claims, as of `now` on the store's clock. Thread-safe.

        `alone` may run the job instead of the device stage, and returns whether it did.
        """
        arrived = time.monotonic()
        self.device.clock = now - arrived
        able = []
        for delivery in deliveries:
            assert delivery.claim is not None
            if delivery.claim.verdict is not Verdict.RUN:
                self._not_run(delivery, delivery.claim, now)
            elif delivery.claim.blamed >= MOST_ENDED:
                self._give_up(delivery, f"{delivery.claim.blamed} workers ended while they held the job")
            elif delivery.claim.attempts >= (most := delivery.ticket.attempts(self.shared.store.limits.attempts)):
                self._give_up(delivery, f"after {most} attempts that ended without an answer")
            else:
                able.append(delivery)
        self._admit(able, arrived, alone)

    def _claim(self, deliveries: Sequence[Delivery]) -> None:
        if not deliveries:
            return
        pairs = [(delivery.job, delivery.ticket.deadline_at) for delivery in deliveries]
        now, claims = insist(lambda: self.shared.store.claim(pairs), self._stopping, Outage(logger, "cannot claim"))
        for delivery, claim in zip(deliveries, claims, strict=True):
            delivery.claim, delivery.lost, delivery.yields = claim, False, None
        self.admit(deliveries, now)

    def _fetch(self, found: Sequence[Reference]) -> Contents:
        """Fetch the blobs of requests, waiting until the store answers."""
        return insist(lambda: self.shared.store.blobs(found), self.shutdown, Outage(logger, "cannot fetch inputs"))

    def _not_run(self, delivery: Delivery, claim: Claim, now: float) -> None:
        if claim.verdict is Verdict.FINAL:
            self.shared.endings.put([Dropped(delivery)])
        elif claim.verdict is Verdict.LATE:
            self.shared.endings.put([late(delivery, now)])
        else:
            self.shared.admissions.put(delivery, pause=min(max(claim.retry_in, 0.01), LOOK_AGAIN))

    def _give_up(self, delivery: Delivery, reason: str) -> None:
        """Fail a job that crashed its workers, and keep its message as a dead letter."""
        error = DeadLetteredError(f"given up: {reason}")
        self.shared.held.dead_letter(delivery, error.message)
        self.shared.endings.put([Ended(delivery, error=error)])

    def _admit(self, deliveries: Sequence[Delivery], arrived: float, alone: RunAlone | None = None) -> None:
        """Pass the jobs to the device, in groups whose inputs were fetched together.

        All of a group are read before any is prepared: a photograph's decoding evicts what reading the next one needs
        from the processor's caches.
        """
        with contextlib.suppress(BrokerUnavailableError):  # stopping while the store is unavailable: they are requeued
            for some, contents in self._reader.groups(deliveries):
                read = [j for one in some for j in self._tried(one, partial(self._reader.read, one, arrived, contents))]
                jobs = [j for job in read for j in self._prepared(job)]
                if alone is None or len(jobs) != 1 or not alone(jobs[0]):
                    self.device.put(jobs)

    def _prepared(self, job: RunningJob) -> list[RunningJob]:
        """The job, prepared if its variant is already loaded; empty if that failed, which ends the job.

        The store knows meanwhile of a job that may have ended a worker: its preparation may be what did.
        """
        step = partial(self._prepare, job)
        if not job.delivery.suspect:
            return self._tried(job.delivery, step)
        self._note_alone(job.delivery, alone=True)
        prepared = self._tried(job.delivery, step)
        self._note_alone(job.delivery, alone=False)
        return prepared

    def _note_alone(self, delivery: Delivery, *, alone: bool) -> None:
        suspect = [(delivery.job, delivery.token)]
        insist(
            lambda: self.shared.store.alone(suspect, alone=alone),
            self.shutdown,
            Outage(logger, "cannot note a suspect"),
        )

    def _prepare(self, job: RunningJob) -> RunningJob:
        loaded = self.variants.ready(job.model, job.variant)
        if loaded is not None:
            prepare(job, loaded)
        job.patient = patient_seconds(job, self.variants)
        return job

    def _tried(self, delivery: Delivery, step: Callable[[], RunningJob]) -> list[RunningJob]:
        """The job after a step towards running it; empty if the step failed, which ends the job."""
        try:
            return [step()]
        except SealedError as error:
            self.counters.reject(delivery.hardware_class)
            self._give_up(delivery, error.message)
        except TaxiwayError as error:
            if isinstance(error, ModelUnavailableError):  # this worker's models folder may lag behind the router's
                variant = delivery.ticket.variants[delivery.hardware_class]
                self.variants.lacks(variant_key(delivery.ticket.model, variant), str(error.details["reason"]))
            self.shared.endings.put([Ended(delivery, error=error)])
        except Exception as error:  # any failure ends only this request
            logger.exception("request could not be read", extra={"job": delivery.job})
            failed = ExecutionError(f"the request could not be read: {describe(error)}")
            self.shared.endings.put([Ended(delivery, error=failed)])
        return []


class _Properties(msgspec.Struct, frozen=True):
    body_encoding: str


class _Message(msgspec.Struct, frozen=True):
    """The usual form of a message; any other goes to Celery's consumer."""

    body: str
    headers: Headers
    properties: _Properties
    content_type: str = msgspec.field(name="content-type")
    content_encoding: str = msgspec.field(name="content-encoding")


Contents = Mapping[str, Buffer | None]
"""The bytes of each `ref`, None if they have expired."""

FETCHED_BYTES = 4 * 2**20
"""Bytes of blobs fetched together: the memory used besides the largest single request."""

_decode_message = msgspec.json.Decoder(_Message).decode
_decode_request = msgspec.json.Decoder(tuple[tuple[()], Request, msgspec.Raw]).decode
_TAGGED = b'"__type__"'  # marks encoded bytes in a body; all other values are plain JSON


def read_plain(taken: FetchedMessage, keys: Sequence[bytes], hardware_class: str) -> Delivery | None:
    """A plain job's delivery; None if Celery must handle the message: a canvas, an eta, or one to be refused.

    One that was fetched without a claim on the job of its ticket is Celery's too.
    """
    try:
        message = _decode_message(taken.raw)
        headers = message.headers
        usual = (
            headers.task == INFER
            and message.properties.body_encoding == "base64"
            and message.content_type == "application/json"
            and not (headers.eta or headers.compression or headers.stamped_headers)
        )
        if not usual:
            return None
        body = base64.b64decode(message.body, validate=True)
        ticket = ticket_for(hardware_class, headers.task, headers.id, headers.taxiway, body, keys)
        embed = read_embed(body)
    except (*UNREADABLE, binascii.Error, TicketError, InvalidRequestError):
        return None
    if taken.claim is None or taken.job != ticket.job or not embed.is_empty:
        return None
    now = time.time()
    return Delivery(
        ticket.job,
        ticket,
        body,
        message.content_type,
        now,
        hardware_class,
        taken.tag,
        headers,
        parent=parent_of({TRACEPARENT: headers.traceparent, TRACESTATE: headers.tracestate})
        if headers.traceparent is not None
        else None,
        claim=taken.claim,
    )


@dataclass(frozen=True, slots=True)
class JobReader:
    """Reads deliveries as jobs for the models of `folder`."""

    folder: ModelsFolder
    hardware: Mapping[str, HardwareClass]
    fetch: Callable[[Sequence[Reference]], Contents]
    """Fetches the bytes of the blobs that requests reference."""
    seal_keys: SealKeys | None = None
    """Opens sealed inputs."""

    def groups(self, deliveries: Iterable[Delivery]) -> Iterator[tuple[list[Delivery], Contents]]:
        """The deliveries in order, in groups with the blobs fetched for each group.

        Raises:
            BrokerUnavailableError: the store does not answer.
        """
        group: list[Delivery] = []
        found: list[Reference] = []
        size = 0
        for delivery in deliveries:
            refers = referred(delivery.body)
            more = sum(reference.bytes for reference in refers)
            if found and more and size + more > FETCHED_BYTES:
                yield group, self.fetch(found)
                group, found, size = [], [], 0
            group.append(delivery)
            found += refers
            size += more
        yield group, self.fetch(found) if found else {}

    def read(self, delivery: Delivery, now: float, contents: Contents) -> RunningJob:
        """The job, with its rows bound but not prepared. `contents` has the blobs of its request.

        Raises:
            RequestError: the request is invalid, or its sealed inputs cannot be opened.
            ModelUnavailableError: the model is disabled or missing in this worker's catalogue, or lacks the variant.
        """
        ticket = delivery.ticket
        request = _request(delivery)
        delivery.tenant = request.tenant
        delivery.sealed = sealed_in(request.inputs)
        if delivery.sealed is not None:
            job, model_id = ticket.job, ticket.model
            request = opened_request(request, delivery.sealed, self.seal_keys, job=job, model=model_id)
        elif may_refer(delivery.body):
            inputs, parameters = resolved(request.inputs, contents), resolved(request.parameters, contents)
            request = msgspec.structs.replace(request, inputs=inputs, parameters=parameters)
        variant = ticket.variants[delivery.hardware_class]
        model, bound = self._bound(ticket.model, variant, request)
        check_stream(model, bound, request.stream)
        return RunningJob(
            delivery=delivery,
            hardware=self.hardware[delivery.hardware_class],
            model=model,
            variant=variant,
            key=variant_key(model.id, variant),
            rows=bound.rows,
            parameters=bound.parameters,
            outputs=bound.outputs,
            single=bound.single,
            arrived=now,
            deadline=delivery.deadline_at or math.inf,
            stream=bool(request.stream) and delivery.sealed is None,
        )

    def _bound(self, reference: str, variant: str, request: Request) -> tuple[Model, Bound]:
        """The model, and the request bound to it.

        A request that does not fit was accepted by what a router knew: it is held against the files as they are now.
        """
        model = self._model(reference, variant)
        try:
            return model, bind(model, request.inputs, request.parameters, request.outputs)
        except InvalidRequestError:
            self.folder.look()
            if self._model(reference, variant) is model:
                raise
        model = self._model(reference, variant)
        return model, bind(model, request.inputs, request.parameters, request.outputs)

    def _model(self, reference: str, variant: str) -> Model:
        """The model with this variant; a router may see a change of the models folder shortly before this worker.

        Raises:
            ModelUnavailableError: it is disabled here, no longer has the variant, or is not in the catalogue.
        """
        served = self.folder.catalogue.models.get(reference)
        if served is None or variant not in served.variants:
            self.folder.look()
        try:
            model = self.folder.catalogue.resolve(reference)
        except UnknownModelError as error:  # the router that placed the job knew it
            raise _gone(reference, "it is not in the models folder of the worker that it was placed on") from error
        if variant not in model.variants:
            listed = ", ".join(model.variants)
            raise _gone(reference, f"its variant {variant!r} is no longer in the catalogue ({listed})")
        return model


def _gone(model: str, reason: str) -> ModelUnavailableError:
    return ModelUnavailableError(f"model {model!r} changed: {reason}", model=model, reason=reason)


def _request(delivery: Delivery) -> Request:
    """The request. A router has validated it, so checking types is enough, unless it uses another message form."""
    if delivery.content_type == "application/json":
        try:
            request = _decode_request(delivery.body)[1]
        except msgspec.MsgspecError:
            pass
        else:
            if _TAGGED not in delivery.body:
                return request
            inputs, parameters = from_wire(request.inputs), from_wire(request.parameters, "parameters")
            return msgspec.structs.replace(request, inputs=inputs, parameters=parameters)
    return read_request(delivery.body, delivery.content_type)


def prepare(job: RunningJob, loaded: Loaded) -> None:
    """Convert the job's rows to items, and add all of them to the buckets of their sizes.

    Raises:
        RequestError: a row is invalid; names the input, and the row if there are several.
        ExecutionError: the pipeline itself failed.
    """
    items: list[Item] = []
    for index, (row, parameters) in enumerate(zip(job.rows, _parameters_of(job), strict=True)):
        try:
            item = loaded.pipeline.prepare(row, parameters)
            item.size, item.level = clamped(item.size), job.ticket.level
            items.append(item)
        except TaxiwayError as error:
            raise named_row(error, index, job) from error
        except BaseException as error:  # a pipeline's own code may raise anything, SystemExit too
            failed = ExecutionError(f"{loaded.key}: cannot prepare it: {describe(error)}")
            raise named_row(failed, index, job) from error
    job.items = items
    job.answers = [None] * len(items)
    gather(job)


def _parameters_of(job: RunningJob) -> Iterator[Mapping[str, Any]]:
    """Each row's parameters. A prompt that comes again has a seed one higher each time: its texts are to differ."""
    seed = job.parameters.get(_SEED) if job.model.pipeline == "generation" else None
    came: Counter[Any] = Counter()
    for row in job.rows:
        if seed is None:
            yield job.parameters
            continue
        prompt = row[job.model.inputs[0].name]
        prompt = prompt if isinstance(prompt, str) else bytes(prompt)
        yield {**job.parameters, _SEED: seed + came[prompt]}
        came[prompt] += 1


def gather(job: RunningJob) -> None:
    """Add the prepared rows without an answer to the buckets of their sizes."""
    job.waiting = {}
    for index, item in enumerate(job.items):
        if job.answers[index] is None:
            job.waiting.setdefault(bucket_of(item.size, job.model.buckets), []).append(index)


def named_row(error: TaxiwayError, index: int, job: RunningJob) -> TaxiwayError:
    """The error with the row's index if the job has several rows: `inputs.image[3]: expected …`."""
    if len(job.rows) == 1:
        return error
    field = str(error.details.get("field", ""))
    named = error.message.startswith(f"{field}: ") and field.startswith("inputs.")
    message = f"{field}[{index}]{error.message.removeprefix(field)}" if named else f"row {index}: {error.message}"
    return type(error)(message, **(error.details | {"row": index}))

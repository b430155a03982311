"""What happens to an arrival: it is placed, fails at once, cancels another job, or is dead-lettered.

No I/O, as in `admission`, which places the requests read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TypeGuard

import msgspec
from msgspec.structs import replace

from broker.port import Arrival
from broker.valkey.forwarding import Drawn, RefusedJob
from broker.valkey.jobs import REFUSED_TOKEN, Ending
from router.decide.fairness import is_crowded
from router.decide.working_snapshot import WorkingSnapshot
from router.service.admission import (
    Order,
    Place,
    Rules,
    admit,
    check_size,
    digest_at,
    hooks_of,
    refused_receipt,
    unserved,
)
from router.service.celery_message import NOTHING_AFTER, After, after_failure, check_embed, check_headers
from tasks.canvas import Embed, read_embed
from tasks.history import UnservedTerms
from tasks.queues.receipts import PlacementReceipt
from tasks.ticket import job_id
from tasks.webhooks import HOOKS
from taxiway.contract.job import failure_meta, state_of
from taxiway.contract.keys import CANCEL, DEFAULT_QUEUE, INFER, submission_id
from taxiway.contract.limits import check_json, surely_fits
from taxiway.contract.request import MAX_NAME, Request, check_content, check_terms
from taxiway.contract.values import may_refer, references
from taxiway.contract.wire import HEADER, Envelope, check_signed, decode_envelope, misplaced, read_body, read_request
from taxiway.errors import DeadLetteredError, InvalidRequestError, NoDeviceError, TaxiwayError, cut, quoted, wrong_field

LONGEST_ID = 4096
"""Characters of the longest id under which its producer finds why the message was refused."""

_decode_body = msgspec.json.Decoder(tuple[tuple[()], Request, Embed | None]).decode


class StoredRefusal(msgspec.Struct, frozen=True):
    """A stored result under the task id `submission`, published to the client `reply`.

    `digest` is that of a request under an idempotency key, whose `job` may have been accepted before; empty if unknown.
    """

    submission: str
    meta: bytes
    reply: str
    job: str = ""
    digest: str = ""


class End(msgspec.Struct, frozen=True):
    """The arrival's job ends at once."""

    ending: Ending
    code: str  # of its error
    deviceless: bool = False  # no device is live, which a fresher snapshot may change
    crowded: bool = False  # as `is_crowded`
    refusal: StoredRefusal | None = None  # for its submitter, independent of the job that has its idempotency key
    refused: RefusedJob | None = None  # the refused request, for its record
    after: After = NOTHING_AFTER  # what follows once the ending is written
    receipt: PlacementReceipt | None = None  # of a refused request with labels
    unserved: UnservedTerms | None = None  # of a request that was refused for lack of hardware


class Cancel(msgspec.Struct, frozen=True):
    """The arrival cancels a job."""

    job: str


class GiveUp(msgspec.Struct, frozen=True):
    """The arrival becomes a dead letter, for a `reason`; who waits for its job, if it names one, learns its `end`."""

    reason: str
    end: End | None = None


Decision = Place | End | Cancel | GiveUp
"""What happens to an arrival."""


def end_of(decision: Decision) -> End | None:
    """The end of an arrival's job; None if it goes on, or there is none."""
    if isinstance(decision, GiveUp):
        return decision.end
    return decision if isinstance(decision, End) else None


def decide_read(found: Order | Decision, rules: Rules, working: WorkingSnapshot) -> Decision:
    """The decision for an arrival that was read. Never raises for anything that a producer may have written."""
    if not isinstance(found, Order):
        return found
    try:
        return admit(found, rules, working)
    except TaxiwayError as error:
        return replace(refuse(found, rules, error), unserved=unserved(found, rules, working, error))


def refuse(order: Order, rules: Rules, error: TaxiwayError) -> End:
    """The end of an arrival whose request is refused."""
    end = _fail(order.envelope, order.job, error, rules)
    refusal = end.refusal and replace(end.refusal, job=order.job, digest=digest_at(order, rules))
    refused, receipt = _refused(order, rules, end.ending.meta), refused_receipt(order, rules, error)
    return replace(end, refusal=refusal, refused=refused, receipt=receipt)


def _refused(order: Order, rules: Rules, meta: bytes) -> RefusedJob:
    """What is recorded of a refused request."""
    try:
        hooks = hooks_of(order, rules)
    except InvalidRequestError:  # it names an unknown endpoint
        hooks = rules.webhooks.record(order.request.tenant, None)
    fields = {"model": cut(order.request.model), "tenant": cut(order.request.tenant)}
    webhooks = {HOOKS: hooks} if hooks else {}
    return RefusedJob(repr(order.accepted), {**fields, **webhooks}, meta if hooks else b"")


def read(arrival: Arrival, rules: Rules, now: float) -> Order | Decision:
    """The request in an arrival, or the decision if it has none. Does not depend on the fleet's state."""
    tag, envelope = arrival.tag, arrival.envelope
    if envelope is None:
        return GiveUp(arrival.flaw)
    task, job = envelope.headers.get("task"), envelope.headers.get("id")
    if not isinstance(job, str) or not 0 < len(job) <= LONGEST_ID:
        return GiveUp(f"id: expected 1 to {MAX_NAME} characters, got {quoted(job)}")
    if flaw := _signature_flaw(tag, envelope, rules, now):
        return GiveUp(flaw)
    try:
        if task == CANCEL:
            return Cancel(_cancelled_job(envelope))
        if task != INFER:
            raise wrong_field("task", f"{INFER} or {CANCEL}", task)
        if not _is_name(job):
            expected = f"a task_id of at most {MAX_NAME} characters"
            raise InvalidRequestError(f"id: expected {expected}, got {len(job)}: {quoted(job)}", field="id")
        return read_order(envelope, job=job, reply=_reply_of(envelope), tag=tag, now=now, rules=rules)
    except TaxiwayError as error:
        end = _fail(envelope, job, error, rules)
        return end if task in (INFER, CANCEL) else GiveUp(error.message, end)


def _signature_flaw(tag: str, envelope: Envelope, rules: Rules, now: float) -> str:
    """Why an arrival fails the required producer signature; empty if it passes or none is required.

    The client named in it is not notified, because the sender is unknown. Replayed dead letters have no `tag` and are
    not checked.
    """
    if not tag or not rules.producers:
        return ""
    try:
        check_signed(envelope, rules.producers, now=now, longest=rules.topology.limits.keep_record)
    except InvalidRequestError as error:
        return error.message
    return ""


def undecidable(arrival: Arrival, fault: Exception) -> GiveUp:
    """The decision for an arrival on which `read` or `decide_read` failed: dead-letter it, and fail its job.

    So waiters are notified. What follows from it is not sent, as reading that may have failed.
    """
    error = DeadLetteredError(f"the router failed to process the message: {cut(repr(fault))}")
    envelope = arrival.envelope
    job = envelope.headers.get("id") if envelope is not None else None
    if envelope is None or not _is_name(job):
        return GiveUp(error.message)
    return GiveUp(error.message, _end(envelope, job, error))


def misdirected_ending(arrival: Arrival) -> Ending | None:
    """The ending of a request sent to Celery's default queue; None if it has no id."""
    job = arrival.envelope.headers.get("id") if arrival.envelope is not None else None
    if arrival.envelope is None or not _is_name(job):
        return None
    return _end(arrival.envelope, job, misplaced(DEFAULT_QUEUE)).ending


def decide_held(
    drawn: Drawn, rules: Rules, working: WorkingSnapshot, *, now: float, expected_batch: int
) -> Place | End:
    """The decision for a held job: place it, keep holding it, or end it. Never raises for its content.

    `expected_batch` is the number of jobs of its kind that can be released with it, at most what a batch can hold.
    """
    envelope = decode_envelope(drawn.message)
    job, reply, order = str(envelope.headers["id"]), drawn.reply, None
    try:
        order = read_order(envelope, job=job, reply=reply, tag="", now=drawn.accepted, rules=rules)
        order = replace(order, released=now, expected_batch=expected_batch, due=drawn.deadline_at)
        return admit(order, rules, working)
    except TaxiwayError as error:
        ending = Ending(job, state_of(error), failure_meta(job, error), reply=reply)
        after = after_failure(envelope, job, error, rules.topology.limits.elements)
        receipt = None if order is None else refused_receipt(order, rules, error)
        return End(ending, error.code, isinstance(error, NoDeviceError), after=after, receipt=receipt)


def read_order(envelope: Envelope, *, job: str, reply: str, tag: str, now: float, rules: Rules) -> Order:
    """The request in a message from a broker interface. Its terms are checked on admission.

    Raises:
        RequestTooLargeError: its body exceeds a limit.
        InvalidRequestError: names the wrong field.
    """
    check_headers(envelope)
    body, limits = envelope.payload(), rules.topology.limits
    check_size(len(body), limits.payload)
    check_json(body, limits.elements)
    request = _request(body, envelope.content_type)
    if request.idempotency_key is not None:
        job = _job_of_key(envelope, request, job, rules.secret)
    order = Order(
        job,
        request,
        envelope,
        body,
        accepted=now,
        reply=reply,
        tag=tag,
        blobs=_blobs(body, request),
        submission=_submission_of(envelope),
    )
    check_size(order.size, limits.payload)
    return order


def _job_of_key(envelope: Envelope, request: Request, job: str, secrets: Sequence[bytes]) -> str:
    """The id of the job under the request's key: the message gets it unless it has it, and its sender gets it.

    Raises:
        InvalidRequestError: its sender waits for the message's own id, as Celery does.
    """
    check_terms(request)
    ids = [job_id(request, secret) for secret in secrets]
    if job in ids:
        return job
    if not _submission_of(envelope):
        expected = "none in a message of plain Celery, whose task_id takes its place"
        raise wrong_field("idempotency_key", expected, request.idempotency_key)
    envelope.headers |= {"id": ids[0], "root_id": ids[0]}
    envelope.properties |= {"correlation_id": ids[0]}
    return ids[0]


def _request(body: bytes, content_type: str) -> Request:
    """The request in a body: decoded directly if our client encoded it, else with full error reporting."""
    if content_type == "application/json":
        with suppress(ValueError, RecursionError):  # includes msgspec's errors and integers with too many digits
            _, request, embed = _decode_body(body)
            if not surely_fits(body):
                check_content(request)
            if embed is not None:
                check_embed(embed)
            return request
    request = read_request(body, content_type)
    check_embed(read_embed(body))
    return request


def _blobs(body: bytes, request: Request) -> Mapping[str, int]:
    """The blobs that the request refers to. Each must have its digest, so that the body's signature covers it."""
    found = references([request.inputs, request.parameters]) if may_refer(body) else ()
    sizes = {}
    for reference in found:
        if not reference.digest:
            raise InvalidRequestError("digest: expected a blob's SHA-256 with its reference, got none", field="digest")
        sizes[reference.ref] = reference.bytes
    return sizes


def _fail(envelope: Envelope, job: str, error: TaxiwayError, rules: Rules) -> End:
    """The end of a job, and of what was to follow it."""
    after = after_failure(envelope, job, error, rules.topology.limits.elements)
    return replace(_end(envelope, job, error), after=after)


def _end(envelope: Envelope, job: str, error: TaxiwayError) -> End:
    """The end of a job, for those who wait for it or submitted it."""
    reply, submission = _reply_of(envelope), _submission_of(envelope)
    ending = Ending(job, state_of(error), failure_meta(job, error), token=REFUSED_TOKEN, reply=reply)
    refusal = StoredRefusal(submission, failure_meta(submission, error), reply) if submission else None
    return End(ending, error.code, isinstance(error, NoDeviceError), is_crowded(error), refusal)


def _is_name(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME


def _header(envelope: Envelope, name: str) -> str:
    """A name in our header; empty if it has none."""
    header = envelope.headers.get(HEADER)
    value = header.get(name) if isinstance(header, dict) else None
    return value if _is_name(value) else ""


def _reply_of(envelope: Envelope) -> str:
    """The client that waits for the job's end."""
    return _header(envelope, "reply")


def _submission_of(envelope: Envelope) -> str:
    """The task id under which a submitter learns whether the job under its idempotency key matches its request."""
    submission = _header(envelope, "submission")
    return submission_id(submission) if submission else ""


def _cancelled_job(envelope: Envelope) -> str:
    args, _ = read_body(envelope.payload(), envelope.content_type)
    if len(args) != 1 or not _is_name(args[0]):
        raise InvalidRequestError("args: expected one job id", field="args")
    return str(args[0])

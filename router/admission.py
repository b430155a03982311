"""Turns what a producer sent into what the fleet does with it: a signed, placed message, an error, or a letter.

No I/O: the fleet's state, the time and the rules are arguments. The payload is read for the request's terms and the
number of its rows; its values are checked by the worker that runs it (and by the HTTP door before).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import msgspec

from router.classify import Needs, needs_of
from router.explain import Explanation, basis_text, explain
from router.outlook import Outlook
from router.placement import Placement, seed_of
from router.tenants import Tenants
from tasks.catalogue import Catalogue, Model, TensorSpec
from tasks.lengths import LONGEST, Lengths, generates, predicted
from tasks.profiles import ProfileBook
from tasks.scripts import Ending
from tasks.ticket import Ticket, sign
from tasks.topology import Topology
from tasks.transport import Arrival, Outgoing
from taxiway.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    NoDeviceError,
    RequestTooLargeError,
    TaxiwayError,
)
from taxiway.job import JobState, failure_meta, state_of
from taxiway.keys import CANCEL, INFER, arrived_cell, lengths_cell, spent_key, work_cell
from taxiway.request import MAX_NAME, Request, job_id
from taxiway.values import is_tensor
from taxiway.wire import HEADER, Envelope, read_body, read_request

_CHARACTERS_PER_TOKEN = 4  # of English text in a WordPiece vocabulary, about
_TOKENS_AROUND = {"text": 2, "generation": 31}  # special tokens; SmolLM2's chat template with its system prompt
_SHOWN_AT_MOST = 400  # characters of a placement in Flower's task details


@dataclass(frozen=True, slots=True)
class Rules:
    """What every admission goes by."""

    topology: Topology
    catalogue: Catalogue
    secret: bytes
    book: ProfileBook = field(default_factory=ProfileBook)


@dataclass(frozen=True, slots=True)
class Order:
    """A request under its job's id, with the message that carries it. `accepted` is the store's time."""

    job: str
    request: Request
    envelope: Envelope
    body: bytes
    accepted: float
    reply: str = ""
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A placed request: its message, where it goes, and the seconds of device time it adds there."""

    outgoing: Outgoing
    placement: Placement
    ticket: Ticket
    work: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of an arrival; `cancel` is the id of a job to cancel, `letter` why the message is parked.

    `deviceless` says that the ending is for want of a live device, which a fresher picture of the fleet may show.
    """

    tag: str
    admitted: Admitted | None = None
    ending: Ending | None = None
    cancel: str = ""
    letter: str = ""
    deviceless: bool = False


def decide(arrival: Arrival, rules: Rules, outlook: Outlook, now: float) -> Decision:
    """What to do with an arrival. Never raises for what a producer may have written."""
    tag, envelope = arrival.tag, arrival.envelope
    if envelope is None:
        return Decision(tag, letter=arrival.flaw)
    task, job = envelope.headers.get("task"), envelope.headers.get("id")
    if not isinstance(job, str) or not 0 < len(job) <= MAX_NAME:
        return Decision(tag, letter=f"id: expected 1 to {MAX_NAME} characters, got {str(job)[:MAX_NAME]!r}")
    reply = _reply_of(envelope)
    try:
        if task == CANCEL:
            return Decision(tag, cancel=_cancelled_job(envelope))
        if task != INFER:
            raise InvalidRequestError(f"task: expected {INFER} or {CANCEL}, got {str(task)[:MAX_NAME]!r}", field="task")
        order = read_order(envelope, job=job, reply=reply, tag=tag, now=now, limit=rules.topology.limits.payload)
        return Decision(tag, admitted=admit(order, rules, outlook))
    except TaxiwayError as error:
        ending = Ending(job, state_of(error), failure_meta(job, error), reply=reply)
        letter = error.message if task not in (INFER, CANCEL) else ""
        return Decision(tag, ending=ending, letter=letter, deviceless=isinstance(error, NoDeviceError))


def read_order(envelope: Envelope, *, job: str, reply: str, tag: str, now: float, limit: int) -> Order:
    """The request in a message from a broker door.

    Raises:
        RequestTooLargeError: its body is over `limit` bytes.
        InvalidRequestError: names the field that is wrong.
    """
    body = envelope.payload()
    check_size(len(body), limit)
    request = read_request(body, envelope.content_type)
    if request.idempotency_key is not None and job != job_id(request):
        raise InvalidRequestError(
            f"idempotency_key: expected the message's id to be {job_id(request)}, which the key and the tenant give, "
            f"got {job!r}; without the key, the id itself is one",
            field="idempotency_key",
        )
    return Order(job, request, envelope, body, accepted=now, reply=reply, tag=tag)


def check_size(size: int, limit: int) -> None:
    """Refuse a payload of more than `limit` bytes.

    Raises:
        RequestTooLargeError: names the limit.
    """
    if size > limit:
        raise RequestTooLargeError(f"payload: expected at most {limit} bytes, got {size}", limit="payload")


def admit(order: Order, rules: Rules, outlook: Outlook) -> Admitted:
    """Place a request and sign the order to run it.

    Raises:
        DeadlineExceededError: Celery's `expires` has passed already.
        TaxiwayError: as `place` and `needs_of` raise it, or because no model has that name.
    """
    model = rules.catalogue.resolve(order.request.model)
    needs = _needs(order, model, rules.topology, outlook.tenants)
    placement = outlook.place(model, needs, seed=seed_of(order.job))
    ticket = _ticket(order, model, needs, placement, rules)
    order.envelope.headers[HEADER] = msgspec.to_builtins(ticket)
    order.envelope.headers["kwargsrepr"] = _shown(model, placement)
    outgoing = Outgoing(
        tag=order.tag,
        queue=placement.candidate.hardware_class,
        level=placement.level,
        envelope=order.envelope,
        job=order.job,
        fields=_record(order, ticket, placement, outlook),
    )
    return Admitted(outgoing, placement, ticket, placement.work)


def preview(order: Order, rules: Rules, outlook: Outlook) -> tuple[Model, Explanation]:
    """The model, and what `admit` would decide now, with all that it decides from; nothing is placed.

    Raises:
        TaxiwayError: as `needs_of` raises it, or because no model has that name.
    """
    model = rules.catalogue.resolve(order.request.model)
    needs = _needs(order, model, rules.topology, outlook.tenants)
    board = outlook.board(model, needs.constraints)
    return model, explain(board, needs, outlook.backlog.seconds, seed=seed_of(order.job))


def rows_of(model: Model, inputs: Any) -> int:
    """How many rows `inputs` seem to have, without looking at their values; 1 where they are not well formed."""
    spec, value = _first(model, inputs)
    if is_tensor(value):
        shape = value["shape"]
        well_formed = isinstance(shape, list) and len(shape) == len(spec.shape) and isinstance(shape[0], int)
        return max(shape[0], 1) if well_formed else 1
    return len(value) if isinstance(value, list) and value and _depth(value) == len(spec.shape) else 1


def size_of(model: Model, request: Request, lengths: Lengths) -> int:
    """A row's expected size: for texts counted in tokens by their length, else what the catalogue says.

    A generated answer counts as long as `lengths`, those of earlier ones, let expect.
    """
    _spec, value = _first(model, request.inputs)
    texts = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
    if model.size_unit != "tokens" or not texts:
        return model.expected_size
    mean = sum(map(len, texts)) // len(texts) // _CHARACTERS_PER_TOKEN + _TOKENS_AROUND.get(model.pipeline, 0)
    return min(mean + _answer(model, request, lengths), model.buckets[-1])  # a longer text is cut at the last bucket


def _answer(model: Model, request: Request, lengths: Lengths) -> int:
    """Tokens that a generated answer will have, never more than the request allows; 0 for other models."""
    if not generates(model):
        return 0
    asked = request.parameters.get(LONGEST)
    return predicted(lengths, asked if isinstance(asked, int) else int(model.parameters[LONGEST].default))


def _first(model: Model, inputs: Any) -> tuple[TensorSpec, Any]:
    """The first input with its value, from any of the forms that inputs have."""
    spec = model.inputs[0]
    if isinstance(inputs, list) and inputs and all(is_tensor(i) for i in inputs):
        value = next((i for i in inputs if i.get("name") == spec.name), inputs[0])
        return spec, value["data"] if spec.datatype == "BYTES" else value
    if isinstance(inputs, dict) and spec.name in inputs and not is_tensor(inputs):
        return spec, inputs[spec.name]
    return spec, inputs


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list) and value:
        depth, value = depth + 1, value[0]
    return depth


def _needs(order: Order, model: Model, topology: Topology, tenants: Tenants) -> Needs:
    request = order.request
    needs = needs_of(
        request,
        topology,
        rows=rows_of(model, request.inputs),
        size=size_of(model, request, tenants.lengths(model.id, request.tenant)),
        payload=len(order.body),
        allowance=tenants.allowance(request.tenant, topology, order.accepted),
    )
    expires = _expires(order.envelope)
    if expires is None:
        return needs
    left = expires - order.accepted
    if left <= 0:
        raise DeadlineExceededError(f"expires: passed {-left:.3g} s before it was placed")
    if needs.deadline is not None and needs.deadline <= left:
        return needs
    sooner = msgspec.structs.replace(request, deadline=left)
    again = needs_of(sooner, topology, rows=needs.rows, size=needs.size)
    return replace(needs, deadline=left, level=again.level)


def _expires(envelope: Envelope) -> float | None:
    text = envelope.headers.get("expires")
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"expires: expected a date as ISO 8601, got {text!r}", field="expires") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _ticket(order: Order, model: Model, needs: Needs, placement: Placement, rules: Rules) -> Ticket:
    variants = placement.variants()
    unsigned = Ticket(
        job=order.job,
        task=INFER,
        model=model.id,
        variants=variants,
        prices={name: rules.topology.hardware[name].price.usd_per_hour for name in variants},
        accepted=order.accepted,
        deadline_at=order.accepted + needs.deadline if needs.deadline is not None else 0.0,
        level=placement.level,
        reason=placement.reason,
        reply=order.reply,
    )
    return sign(unsigned, order.body, rules.secret)


def _record(order: Order, ticket: Ticket, placement: Placement, outlook: Outlook) -> dict[str, str]:
    """The job's record as the store keeps it: `job.JobRecord`, and what scripts and explanations need."""
    candidate = placement.candidate
    learning = {"lengths": lengths_cell(ticket.model, order.request.tenant)} if generates(placement.board.model) else {}
    return {
        "state": JobState.QUEUED,
        "model": ticket.model,
        "tenant": order.request.tenant,
        "hardware_class": candidate.hardware_class,
        "variant": candidate.variant_name,
        "reason": placement.reason,
        "level": str(placement.level),
        "accepted": repr(order.accepted),
        "placed": repr(order.accepted),
        "deadline_at": repr(ticket.deadline_at),
        "cell": work_cell(candidate.hardware_class, placement.level),
        "work": repr(placement.work),
        "arrived": arrived_cell(candidate.hardware_class, ticket.model),
        "rows": str(placement.needs.rows),
        "reply": order.reply,
        "basis": basis_text(placement, outlook.reading, outlook.backlog),
        **learning,
        **_spending(placement),
    }


def _spending(placement: Placement) -> dict[str, str]:
    """What the placement costs a tenant with a budget, and where that is counted."""
    allowance = placement.needs.allowance
    return {"spent": spent_key(allowance.day), "cost": repr(placement.cost)} if allowance is not None else {}


def _shown(model: Model, placement: Placement) -> str:
    candidate = placement.candidate
    text = f"{model.id} on {candidate.hardware_class}/{candidate.variant_name}: {placement.reason}"
    return text if len(text) <= _SHOWN_AT_MOST else text[: _SHOWN_AT_MOST - 1] + "…"


def _reply_of(envelope: Envelope) -> str:
    header = envelope.headers.get(HEADER)
    reply = header.get("reply") if isinstance(header, dict) else None
    return reply if isinstance(reply, str) and len(reply) <= MAX_NAME else ""


def _cancelled_job(envelope: Envelope) -> str:
    args, _ = read_body(envelope.payload(), envelope.content_type)
    if len(args) != 1 or not isinstance(args[0], str) or not 0 < len(args[0]) <= MAX_NAME:
        raise InvalidRequestError("args: expected one job id", field="args")
    return str(args[0])

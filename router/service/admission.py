"""Turns a request into a placed, signed message, or raises why it is refused.

No I/O: the fleet's state, the time and the rules are arguments. The payload is read only for the request's terms and
its number of rows. The worker that runs it checks its values (and the HTTP API has done so before).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from broker.port import Affinity, Outgoing
from broker.valkey.jobs import Course, exceeded
from router.decide.basis import unserved_terms
from router.decide.classify import Needs, Prefix, needs_of
from router.decide.fairness import Tenants, check_limits
from router.decide.placement import Placement, seed_of
from router.decide.prefixes import BLOCK, BLOCKS, Prompt, prefixes_of, slots_worth
from router.decide.webhooks import Endpoints
from router.decide.working_snapshot import Template, WorkingSnapshot
from router.service.celery_message import moment_of
from router.service.classifier import Classifier, classified
from tasks.history import UnservedTerms
from tasks.models.catalogue import Catalogue
from tasks.models.chats import TOKENS_OF_MESSAGE, beginning
from tasks.models.model import Model, generates
from tasks.models.profiles import Lengths, ProfileBook, bin_of, predicted, tokens_of
from tasks.models.signature import KeyUse, key_use
from tasks.models.sizes import facts_of, given_inputs, quantised
from tasks.queues.locality import joined
from tasks.queues.receipts import PlacementReceipt, Sign, lacking, rules_by_label
from tasks.queues.sealing import labels_of_sealed, sealed_message
from tasks.ticket import Ticket, attach
from tasks.topology import Topology
from taxiway.contract.keys import blob_key
from taxiway.contract.request import LONGEST_DEADLINE, Request, check_terms
from taxiway.contract.sealed import ContentFacts, sealed_in
from taxiway.contract.wire import Envelope
from taxiway.errors import (
    InvalidRequestError,
    NoDeviceError,
    OverloadedError,
    RequestTooLargeError,
    TaxiwayError,
    wrong_field,
)

if TYPE_CHECKING:
    from taxiway.sealing import SealKeys

_terms_of = attrgetter("model", "deadline", "service", "priority", "budget", "tenant", "locality", "min_accuracy")

_REMOVED_MODELS = 256
"""Most removed models that a router knows for the results of their jobs."""


@dataclass(slots=True)
class Rules:
    """What every admission depends on. `renew` replaces the topology, the catalogue and the book."""

    topology: Topology
    catalogue: Catalogue
    secret: tuple[bytes, ...] = field(repr=False)
    book: ProfileBook = field(default_factory=ProfileBook)
    producers: tuple[bytes, ...] = field(default=(), repr=False)
    """Keys of which one must have signed an arrival, if there are any."""
    starts: frozenset[str] = frozenset()
    """Classes whose devices an autoscaler starts on demand: they accept work without any."""
    webhooks: Endpoints = field(default_factory=Endpoints)
    """Their endpoints as last read."""
    classify: Classifier | None = None
    """Labels requests by their content."""
    sign: Sign | None = field(default=None, repr=False)
    """Signs receipts with the site's key."""
    seal_keys: SealKeys | None = field(default=None, repr=False)
    """Seals inputs, and opens results; None where no label is sealed."""
    _removed: dict[str, Model] = field(default_factory=dict, repr=False)

    def renew(self, topology: Topology, catalogue: Catalogue, book: ProfileBook) -> None:
        """Replace them; the topology may differ from the last one only in endpoints and new classes."""
        gone = {name: model for name, model in self.catalogue.models.items() if name not in catalogue.models}
        self._removed = dict(list((self._removed | gone).items())[-_REMOVED_MODELS:])
        self.topology, self.catalogue, self.book = topology, catalogue, book

    def model_of(self, name: str) -> Model:
        """The model of a job that has run, by `name:version`, even if removed since. Raises as `resolve`."""
        return self.catalogue.models.get(name) or self._removed.get(name) or self.catalogue.resolve(name)


class Order(msgspec.Struct, frozen=True):
    """A request under its job's id, with the message that carries it."""

    job: str
    request: Request
    envelope: Envelope
    body: bytes
    accepted: float
    """Seconds by the store's clock."""
    reply: str = ""
    """The client's name."""
    tag: str = ""
    blobs: Mapping[str, int] = {}
    """Bytes of each blob that the body refers to."""
    released: float = 0.0
    """When it left holding, by the store's clock, together with `expected_batch` jobs of its kind."""
    expected_batch: int = 0
    due: float = 0.0
    """Its deadline by the store's clock, 0 if it has none."""
    submission: str = ""
    """Where its submitter waits to learn whether the job under its idempotency key has the same request."""
    sealed: tuple[str, ...] = ()
    """The labels that its inputs are sealed for in the message."""
    notify: bool = True
    """Whether webhook endpoints are notified of its end; not of a batch's line."""

    @property
    def moment(self) -> float:
        """The store's time of the decision."""
        return self.released or self.accepted

    @property
    def size(self) -> int:
        """Bytes of the request, blobs included."""
        return len(self.body) + sum(self.blobs.values())

    @property
    def payload(self) -> int:
        """`size` to a few binary digits: requests that differ by less are placed alike."""
        return _about(self.size)


def _about(amount: int) -> int:
    """The amount to five binary digits, rounded up."""
    step = max(amount.bit_length() - 5, 0)
    return -(-amount >> step) << step


class Place(msgspec.Struct, frozen=True):
    """A placed request: its message, where it goes, and the ticket to run there; and the prefixes of its prompt."""

    outgoing: Outgoing
    placement: Placement
    ticket: Ticket
    prefixes: tuple[bytes, ...] = ()


def check_size(size: int, limit: int) -> None:
    """Refuse a payload of more than `limit` bytes.

    Raises:
        RequestTooLargeError: names the limit.
    """
    if size > limit:
        raise RequestTooLargeError(too_large(limit, size), limit="payload", most=limit, got=size)


def too_large(most: object, got: object) -> str:
    """The message for a payload over its limit, at every interface."""
    return f"payload: expected at most {most} bytes, got {got}"


def admit(order: Order, rules: Rules, working: WorkingSnapshot) -> Place:
    """Place a request and sign the ticket to run it.

    Raises:
        DeadlineExceededError: Celery's `expires` has passed, or the deadline of a held job.
        InvalidRequestError: a term is invalid.
        TaxiwayError: as `place` and `needs_of` raise it, or because the model is unknown.
    """
    topology, tenant, size, depths = rules.topology, order.request.tenant, order.size, working.depths
    if not order.released:
        depth = depths.tenants.get(tenant, 0)
        check_limits(f"tenants.{tenant}", topology.rules_of(tenant), size=size, depth=depth)
    model, prompt, measurements = _measured(order, rules, working)
    template = _template(order, rules, working, model, measurements)
    placement = template.placement
    if not order.released:
        name = placement.candidate.hardware_class
        check_limits(f"hardware.{name}", topology.hardware[name], size=size, depth=depths.classes.get(name, 0))
    ticket, use = template.ticket(order.job, order.reply, order.accepted, order.moment), use_of(order, rules)
    _check_eta(order.envelope, ticket)
    order = _sealed(order, rules, model, measurements.locality, placement.needs.constraints.locality)
    if not placement.held:
        attach(ticket, order.envelope, order.body, rules.secret)
        order.envelope.headers["kwargsrepr"] = template.shown
    record = template.record(order.accepted, order.moment, hooks_of(order, rules))
    outgoing = Outgoing(
        tag=order.tag,
        queue=template.queue,
        level=placement.level,
        envelope=order.envelope,
        job=order.job,
        fields={**record, "blobs": " ".join(map(blob_key, order.blobs))} if order.blobs else record,
        reply=order.reply,
        use=use,
        affinity=_affinity(placement, prompt, topology.limits.lease),
        receipt=_placed(order, rules, model, measurements, placement),
    )
    return Place(outgoing, placement, ticket, prompt.prefixes)


def _placed(
    order: Order, rules: Rules, model: Model, measurements: Measurements, placement: Placement
) -> PlacementReceipt | None:
    """The receipt of a placement; None if the request may go anywhere, or is held."""
    if placement.held or placement.needs.constraints.locality is None:
        return None
    labels = rules_by_label(order.request, rules.topology, model, measurements.locality)
    return _receipt(order, rules, model, labels, hardware_class=placement.candidate.hardware_class)


def refused_receipt(order: Order, rules: Rules, error: TaxiwayError) -> PlacementReceipt | None:
    """The receipt of a refusal; None if the request may go anywhere, or its labels cannot be told."""
    try:
        model = rules.catalogue.resolve(order.request.model)
        check_terms(order.request)
        labels = rules_by_label(order.request, rules.topology, model, _locality(order, model, rules))
    except TaxiwayError:
        return None
    return _receipt(order, rules, model, labels, error=error.code) if labels else None


def _receipt(
    order: Order,
    rules: Rules,
    model: Model,
    labels: Mapping[str, tuple[str, ...]],
    *,
    hardware_class: str = "",
    error: str = "",
) -> PlacementReceipt:
    return PlacementReceipt(
        job=order.job,
        event="refused" if error else "placed",
        at=order.moment,
        labels=labels,
        lacking=lacking(labels, rules.topology),
        hardware_class=hardware_class,
        error=error,
        model=model.id,
        tenant=order.request.tenant,
    )


_NO_PROMPT = Prompt()


def sealed(order: Order, rules: Rules) -> Order:
    """The order as `admit` seals it, in advance and off the event loop: 8 MiB take 50 ms. Raises as `admit`."""
    if not rules.topology.locality.sealed:
        return order
    model = rules.catalogue.resolve(order.request.model)
    found = _locality(order, model, rules)
    return _sealed(order, rules, model, found, _joint_locality(order.request, rules, found))


def _sealed(order: Order, rules: Rules, model: Model, found: str | None, locality: str | None) -> Order:
    """The order with its inputs sealed, if a label of its locality is; `found` is what model and content say."""
    keys = rules.topology.locality.sealing(locality)
    if order.sealed == tuple(keys) or rules.seal_keys is None or sealed_in(order.request.inputs):
        return order
    body = sealed_message(order.job, order.request, order.body, model, rules.seal_keys, keys, found)
    check_size(len(body), rules.topology.limits.payload)
    envelope = order.envelope.with_payload(body)
    return msgspec.structs.replace(order, body=body, envelope=envelope, blobs={}, sealed=tuple(keys))


def _joint_locality(request: Request, rules: Rules, found: str | None) -> str | None:
    """The labels of a request, its tenant and what is `found` in model and content; else the default ones."""
    tenant = rules.topology.rules_of(request.tenant).locality
    return joined(request.locality, tenant, found) or rules.topology.locality.default


def _prompt(order: Order, rules: Rules, working: WorkingSnapshot, model: Model, locality: str | None) -> Prompt:
    """The prefixes of the request's prompt; empty if devices cannot differ in them, and for what is sealed."""
    prefixes, request = working.prefixes, order.request
    if prefixes is None or not generates(model):
        return _NO_PROMPT
    if rules.topology.locality.sealing(_joint_locality(request, rules, locality)):
        return _NO_PROMPT
    value = given_inputs(model, request.inputs).get(model.inputs[0].name)
    owner = f"{request.tenant}\n{model.id}"
    return prefixes.prompt(prefixes_of(owner, beginning(value, BLOCK * BLOCKS)))


def _affinity(placement: Placement, prompt: Prompt, lease: float) -> Affinity | None:
    """Which worker the request prefers, if its class has several devices, and one ran the earlier job."""
    candidate, prefix = placement.candidate, prompt.prefix
    if prefix is None or placement.held or candidate.hardware_class != prefix.hardware_class:
        return None
    if len(candidate.devices) < 2:
        return None
    most = slots_worth(placement.table, placement.index, placement.needs)
    return Affinity(prompt.earlier, tuple(device.worker for device in candidate.devices), most, lease)


def use_of(order: Order, rules: Rules) -> KeyUse | None:
    """The request's use of an idempotency key, if it is the first and other requests may have the key too.

    Raises:
        UnknownModelError: there is no such model.
    """
    key = order.request.idempotency_key
    if key is None or not order.notify or order.released:  # a line's key is made by its batch, of the line
        return None
    model = rules.catalogue.resolve(order.request.model)
    secret = rules.secret[0] if rules.topology.locality.sealed else b""
    return key_use(model, order.request, order.job, order.submission, rules.topology.limits.keep_result, secret)


def digest_at(order: Order, rules: Rules) -> str:
    """The digest in the record of a request's idempotency key; empty if it has none, or if the model is unknown."""
    try:
        use = use_of(order, rules)
    except TaxiwayError:
        return ""
    return use.digest if use is not None else ""


def _check_eta(envelope: Envelope, ticket: Ticket) -> None:
    """Refuse a job whose start time is after its deadline: a worker would hold its message until then for nothing."""
    text = envelope.headers.get("eta")
    late = 0.0 if text is None else moment_of("eta", text).timestamp() - ticket.deadline_at
    if late > 0:
        message = f"eta: expected a time before the job's deadline, got one {late:.3g} s after it: {text}"
        raise InvalidRequestError(message, field="eta")


def hooks_of(order: Order, rules: Rules) -> str:
    """Which endpoints the job's record notifies of its end; empty for none, and where the record has them already.

    Raises:
        InvalidRequestError: the request names an endpoint that its tenant does not have.
    """
    if not order.notify or order.released:
        return ""
    return rules.webhooks.record(order.request.tenant, order.request.webhook)


def _template(
    order: Order, rules: Rules, working: WorkingSnapshot, model: Model, measurements: Measurements
) -> Template:
    """The request's placement: shared by all equal requests, unless it depends on more than those fields."""
    request, until = order.request, _until(order)
    shares = working.tenants.shares
    entitled = shares.work_limit(request.tenant), shares.bypasses_holding(request.tenant)
    key = (*_terms_of(request), *measurements, *entitled)
    seed = seed_of(order.job)
    known = working.placed(key, seed) if until is None else None
    if known is not None:
        return known
    check_terms(request)
    needs = _needs(order, measurements, rules.topology, working.tenants, until)
    kept = key if until is None and needs.allowance is None else None
    return working.place(model, needs, request.tenant, seed, key=kept, released=order.released > 0)


def understood(order: Order, rules: Rules, working: WorkingSnapshot) -> tuple[Model, Needs]:
    """The request's model, and its needs as `admit` would understand them now.

    Raises:
        TaxiwayError: as `needs_of` raises it, or because the model is unknown.
    """
    model, _, measurements = _measured(order, rules, working)
    return model, _needs(order, measurements, rules.topology, working.tenants, _until(order))


def lacks_hardware(error: TaxiwayError) -> bool:
    """Whether a request was refused because no hardware has it in time, and not by a limit or a budget."""
    overloaded = isinstance(error, OverloadedError) and error.details.keys() <= {"retry_after"}
    return overloaded or isinstance(error, NoDeviceError)


def unserved(order: Order, rules: Rules, working: WorkingSnapshot, error: TaxiwayError) -> UnservedTerms | None:
    """What a request asked for that `admit` refused with this error; None if a limit or budget refuses it."""
    if not lacks_hardware(error):
        return None
    model, needs = understood(order, rules, working)
    return unserved_terms(model.id, order.request.tenant, needs)


def sizes_of(model: Model, facts: ContentFacts, lengths: Lengths) -> tuple[int, int]:
    """The mean size of a row, and the part of it that its answer is expected to be by the `lengths` of earlier ones."""
    answer = predicted(lengths, facts.longest) if generates(model) else 0
    return min(facts.size + answer, model.buckets[-1]), answer  # longer texts are cut there


class Measurements(NamedTuple):
    """The measurements of a request, for `Needs`; rounded, so that similar requests share placements."""

    rows: int
    size: int
    output: int
    longest: int
    most_read: int
    payload: int
    expected_batch: int
    asks: tuple[str, ...]
    prefix: Prefix | None
    locality: str | None  # what the model and the content say of where it may go


def _measured(order: Order, rules: Rules, working: WorkingSnapshot) -> tuple[Model, Prompt, Measurements]:
    model, request = rules.catalogue.resolve(order.request.model), order.request
    facts, locality = facts_of(model, request), _locality(order, model, rules)
    prompt = _prompt(order, rules, working, model, locality)
    lengths = working.tenants.lengths(model.id, request.tenant) if generates(model) else {}
    size, answer = sizes_of(model, facts, lengths)
    measurements = Measurements(
        rows=facts.rows,
        size=quantised(model, size),
        output=answer,
        longest=tokens_of(bin_of(facts.longest)),
        most_read=_most_read(order, rules.topology, facts),
        payload=order.payload,
        expected_batch=order.expected_batch,
        asks=facts.asks,
        prefix=prompt.prefix,
        locality=locality,
    )
    return model, prompt, measurements


def _locality(order: Order, model: Model, rules: Rules) -> str | None:
    """The labels of the model and of the content. Content beside its message cannot be read: it needs a label."""
    request = order.request
    if (sealed := sealed_in(request.inputs)) is not None:
        return joined(model.locality, *labels_of_sealed(sealed, rules.topology))
    if rules.classify is None:
        return model.locality
    tenant = rules.topology.rules_of(request.tenant)
    if order.blobs and not joined(request.locality, model.locality, tenant.locality):
        expected = "a label with values that are stored beside their message, which the classifier cannot read"
        raise wrong_field("locality", expected, None)
    return joined(model.locality, classified(rules.classify, model.name, request))


def _most_read(order: Order, topology: Topology, facts: ContentFacts) -> int:
    """The most tokens that a row's prompt may have; 0 where no budget has to bear them."""
    request = order.request
    if request.budget is None and topology.rules_of(request.tenant).usd_per_day is None:
        return 0
    return _about(facts.most_read or -(-order.size // facts.rows) + 2 * TOKENS_OF_MESSAGE)


def _needs(
    order: Order, measurements: Measurements, topology: Topology, tenants: Tenants, until: float | None
) -> Needs:
    """The request's needs, from its measurements and its tenant's allowance."""
    request, left, figures = order.request, _left(order, until), measurements._asdict()
    known = {name: figures.pop(name) for name in ("rows", "size", "asks", "locality")}
    return replace(
        needs_of(request, topology, left=left, **known),
        allowance=tenants.allowance(request.tenant, topology, order.moment),
        work_limit=tenants.shares.work_limit(request.tenant),
        **figures,
    )


def _left(order: Order, until: float | None) -> float:
    """Seconds until the store's time `until`; infinite if that is None.

    Raises:
        DeadlineExceededError: that time has come.
        InvalidRequestError: it is too far away.
    """
    if until is None:
        return math.inf
    left = until - order.moment
    if left > LONGEST_DEADLINE:
        raise wrong_field(
            "expires", f"a time within {LONGEST_DEADLINE} s (30 days)", order.envelope.headers.get("expires")
        )
    if left <= 0:
        raise exceeded(Course(order.moment, until, order.accepted, held=order.released > 0))
    return left


def _until(order: Order) -> float | None:
    """The store's time by which it must be answered, if set by more than its own deadline from now; else None."""
    text = order.envelope.headers.get("expires")
    expires = None if text is None else moment_of("expires", text).timestamp()
    if not order.due:
        return expires
    return order.due if expires is None else min(expires, order.due)

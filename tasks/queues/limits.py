"""The limits that an operator can set in queues.yaml, each with its default."""

from __future__ import annotations

from typing import Annotated

import msgspec

from tasks.document import Size
from taxiway.contract.limits import ELEMENTS
from taxiway.contract.values import INLINE
from taxiway.contract.wire import Durability, confirmations

Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits that an operator can set; sizes in bytes, times in seconds."""

    # One request
    payload: Size = msgspec.field(default_factory=lambda: Size(16 * 2**20))  # a schema cannot show a `Size`
    """Bytes of one request, its large values included."""
    elements: Positive = ELEMENTS
    """Values in one request's JSON, and elements of one BYTES tensor."""
    inflation: Positive = 100
    """How many times its compressed size a compressed body above 1 MiB may have."""
    inline: Size = msgspec.field(default_factory=lambda: Size(INLINE))
    """Bytes above which a value is stored beside its message, and not in it."""
    wait: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """Longest that one long poll waits, in seconds."""

    # What is stored for a tenant
    file: Size = msgspec.field(default_factory=lambda: Size(200 * 2**20))
    """Bytes of one uploaded file."""
    files: Size = msgspec.field(default_factory=lambda: Size(10 * 2**30))
    """Bytes of all files of a tenant."""
    objects: Size = msgspec.field(default_factory=lambda: Size(64 * 2**20))
    """Bytes of the state store that a tenant's stored responses may take, and as many its batches and the records of
    its files."""
    responses: Positive = 10_000
    """Stored responses of a tenant; the oldest go first."""
    keep_response: Annotated[int, msgspec.Meta(ge=1)] = 7 * 86400
    """Seconds that a stored response is kept after its last use."""
    batches: Positive = 100
    """Batches of a tenant that have not ended; further ones are refused."""
    keep_batch: Annotated[int, msgspec.Meta(ge=1)] = 30 * 86400
    """Seconds that a batch is kept after its end."""

    # What is kept of jobs
    keep_result: Annotated[int, msgspec.Meta(ge=1)] = 3600
    """Seconds that a result can be read after its job ended."""
    keep_record: Annotated[int, msgspec.Meta(ge=1)] = 86400
    """Seconds that a job's record is kept after its end; at least `keep_result`."""
    keep_explanation: Annotated[int, msgspec.Meta(ge=1)] = 3600
    """Seconds that the table of candidates behind a placement is kept."""
    keep_history: Annotated[int, msgspec.Meta(ge=3600)] = 14 * 86400
    """Seconds that the history of arrivals is kept; at least an hour."""
    history: Size = msgspec.field(default_factory=lambda: Size(128 * 2**20))
    """Bytes of the state store that the history of arrivals may take; the oldest hours go first."""
    receipts: Positive = 100_000
    """Receipts of labelled work that are kept, the latest; each takes about 0.6 kB of the state store."""

    # Workers and jobs
    lease: Annotated[float, msgspec.Meta(ge=1)] = 15.0
    """Seconds of silence after which a worker's jobs run elsewhere."""
    grace: Seconds = 60.0
    """Seconds within which a worker exits after a stop signal."""
    stall: Annotated[float, msgspec.Meta(gt=0)] = 120.0
    """Seconds, and twenty times its profile, after which a batch is abandoned and its worker ends itself."""
    checkpoint: Size = msgspec.field(default_factory=lambda: Size(64 * 2**20))
    """Bytes of one checkpoint of a Python callable; the state store keeps two for each job that writes some."""
    attempts: Positive = 3
    """Runs without a result after which a job is dead-lettered."""
    yield_within: Annotated[float, msgspec.Meta(gt=0)] = msgspec.field(name="yield", default=5.0)
    """Seconds within which a running job that is asked to yield returns to its queue; later it is ended there."""
    memory_faults: Positive = 3
    """Jobs of a model in a row that ran out of memory after which a worker exits, if the model's example fails too."""

    # Acceptance
    durability: Durability = "written"
    """When a job counts as accepted: once it is `written` to disk, or `replicated` to the store's replicas as well."""
    replicas: Positive = 1
    """Replicas that the store has: a `replicated` job counts once a majority of the primary and these has it."""
    memory: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9
    """Share of the state store's `maxmemory`, 0 to 1, above which nothing is accepted."""

    # HTTP, at one router
    connections: Positive = 4096
    """Connections at the same time; further ones are refused."""
    requests_per_second: Annotated[float, msgspec.Meta(gt=0)] = 1000.0
    """Requests a second of one tenant's keys, after a burst of two seconds' worth."""
    bodies: Size = msgspec.field(default_factory=lambda: Size(256 * 2**20))
    """Bytes of unanswered requests' bodies of one tenant."""
    all_bodies: Size = msgspec.field(default_factory=lambda: Size(2**30))
    """Bytes of unanswered requests' bodies of all tenants together."""

    @property
    def confirmed_by(self) -> int:
        """How many replicas must have a job before it is accepted."""
        return confirmations(self.durability, self.replicas)

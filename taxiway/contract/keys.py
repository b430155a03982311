"""Names of all keys in the state store, which is the broker, too. No other module spells one out."""

from __future__ import annotations

from collections.abc import Callable

ARRIVALS = "taxiway.arrivals"
"""The queue that producers write to."""

INFER = "taxiway.infer"
"""The task that runs a request."""

CANCEL = "taxiway.cancel"
"""The task name of a cancellation message."""

LEVELS = 4
"""Priority levels of a queue; 0 is served first."""

PATIENT = 2
"""The first of the patient levels: work due in more than ten minutes, or without a deadline."""

DEVICES = "taxiway:devices"
"""Hash of worker name to device facts; `HEARTBEATS` holds when each was written, by the store's clock."""

WORK = "taxiway:work"
"""Hash of cell (`work_cell`) to the seconds of device time placed there and not finished, of `held_cell` to those that
wait in holding, and of `arrived_cell` to the rows that ever arrived for a model at a class."""

ARRIVED = "rows"
"""Prefix of the cells that count arrived rows."""

LENGTHS = "taxiway:lengths"
"""Hash of `lengths_cell` to the recent lengths of that model's answers to that tenant (`tasks.models.profiles`)."""

HOLDING = "taxiway:holding"
"""Set of the holding queues that have jobs; each is kept at its `holding_key`."""

HELD = "taxiway:held"
"""Hash of a held job's `job_key` to its message."""

RELEASED = "taxiway:released"
"""Sorted set of `job_key` by the time at which a job that a router took out of holding, but did not place, returns."""

DEADLINES = "taxiway:deadlines"
"""Sorted set of groups of `job_key`s, as MessagePack, by the deadline that their jobs have, on the store's clock."""

ACCEPTED = "taxiway:accepted"
"""Sorted set of groups of `job_key`s, as MessagePack, by when their jobs were accepted, on the store's clock: the index
of all jobs. A group is deleted with the last of its records."""

COUNT = "jobs"
"""Suffix of the `WORK` field that counts a cell's jobs; no release reads it as a level."""

TURNS = "turns"
"""Suffix of the `WORK` field that counts all jobs ever placed in a cell."""

WAITING = "held"
"""Prefix of the cells that count the device seconds held for a hardware class."""

STARTS = "taxiway:starts"
"""Hash of hardware class to the last time (store's clock) that an autoscaler announced to start devices of it."""

DRAINING = "taxiway:draining"
"""Set while the site hands its work to other fleets; has the time (store's clock) since when."""

HEARTBEATS = "taxiway:heartbeats"
SESSIONS = "taxiway:sessions"
"""Sorted set of routers' sessions that may have arrivals in flight, by last sign of life on the broker's clock."""

CATALOGUES = "taxiway:catalogues"
"""Hash of a router's or worker's name to the models it serves; `CATALOGUES_SEEN` has the time of its last report."""

CATALOGUES_SEEN = "taxiway:catalogues-seen"

FAILING = "taxiway:failing"
"""Hash of a machine to its processes that failed and are restarted, each with how it failed, in JSON."""

LEAD = "taxiway:lead"
"""The fencing token of the leading router, while its lease lasts; `LEADS` counts leadership changes."""

LEADS = "taxiway:leads"

MOVES = "taxiway:moves"
"""List of the last moves of waiting work, most recent first."""

RECEIPTS = "taxiway:receipts"
"""Stream of the receipts of labelled work (`tasks.queues.receipts`), each in the field `line`."""

TIMELINE = "taxiway:timeline"
"""List of samples of the fleet in the last 15 minutes (`router.upkeep.timeline`), most recent first."""

MODELS = "taxiway:models"
"""The routers' models as `GET /v2/models` lists them, in JSON, for clients of the broker."""

QUEUES = "taxiway:queues"
"""The routers' queues.yaml and release, in JSON, for machines that join."""

HISTORY = "taxiway:history"
"""Hash of an hour to the bytes that are kept of its arrivals at its `history_key`, and of `RECORDED` to a time."""

RECORDED = "until"
"""The field of `HISTORY` with the time, by the store's clock, up to which arrivals are recorded."""

HISTORY_OPEN = "taxiway:history-open"
"""Sorted set of slices of the history in which some jobs had not ended, by the time to look at them again."""

TUNER = "taxiway:tuner"
"""The fencing token of the tuner at work, while its lease lasts; `TUNERS` counts changes of the tuner."""

TUNERS = "taxiway:tuners"

PLAN = "taxiway:plan"
"""The tuner's plan: which hardware classes it prefers for each model and service."""

TUNING = "taxiway:tuning"
"""What the last tuning found."""

UNACKED = ("unacked", "unacked_index")
"""kombu's hash of unacknowledged messages, and its index by time."""

AMQP_OUTBOX = "taxiway.amqp"
"""List of the messages that the bridge to RabbitMQ publishes there: what follows from jobs that came from there."""

AMQP_SENDER = "taxiway:amqp-sender"
"""The token of the router that empties it, while its lease lasts; `AMQP_SENDERS` counts changes of that router."""

AMQP_SENDERS = "taxiway:amqp-senders"

DEFAULT_QUEUE = "celery"
"""Where Celery sends a task for which its producer names no queue."""

DEAD = "taxiway.dead"
"""List of dead letters, most recent first, each with its reason."""

_SEPARATOR = "\x06\x16"
_STEP = 3


def priority_list(queue: str, level: int) -> str:
    """The Valkey list that holds `queue`'s messages of `level`, where kombu keeps it."""
    return f"{queue}{_SEPARATOR}{level * _STEP}" if level else queue


def priority_lists(queue: str) -> list[str]:
    """All lists of `queue`, first served first."""
    return [priority_list(queue, level) for level in range(LEVELS)]


def redis_priority(level: int) -> int:
    """Celery's number for `level` on Valkey and Redis: 0 is highest."""
    return level * _STEP


def _prefix(text: str) -> Callable[[str], str]:
    """Makes the keys of a kind: each is this text and a name."""
    return text.__add__


result_key = _prefix("celery-task-meta-")
"""The key of a result in Celery's backend, and the channel that announces it."""

submission_id = _prefix("submission.")
"""The pseudo job id under which a submitter is notified whether the job matches its request."""

job_key = _prefix("taxiway:job:")
"""Hash of a job's record."""

blob_key = _prefix("taxiway:blob:")
"""The bytes of a value that a message references."""

stream_key = _prefix("taxiway:stream:")
"""Stream of the pieces of a job's answer, if it is streamed."""

capacity_key = _prefix("taxiway:room:")
"""The remaining capacity of a worker that waits for messages."""

affinity_key = _prefix("taxiway:led:")
"""List of the tags of messages that prefer a worker, whose cache has their prefix (`broker.port.Affinity`)."""

name_key = _prefix("taxiway:name:")
"""The process that has a worker's name."""

kept_key = _prefix("taxiway:kept:")
"""The key that a router writes to check that earlier writes are durable."""

cancelled_channel = _prefix("taxiway:cancelled:")
"""The channel that notifies a worker of jobs it holds that were cancelled or expired."""

reply_channel = _prefix("taxiway:reply:")
"""The channel that announces all results of a client."""

session_key = _prefix("taxiway:session:")
"""Present for as long as a router's session lasts."""

snapshot_key = _prefix("taxiway:snapshot:")
"""A fleet snapshot that placements were based on."""


def in_flight_key(session: str, source: str) -> str:
    """List of the arrivals that a router took from `source` in this session and has not forwarded yet."""
    return f"taxiway:in-flight:{session}:{source}"


def work_cell(hardware_class: str, level: int) -> str:
    """The field of `WORK` that counts a class's jobs of one level."""
    return f"{hardware_class}|{level}"


def jobs_cell(cell: str) -> str:
    """The field of `WORK` that counts the jobs whose device seconds are in a cell."""
    return f"{cell}|{COUNT}"


def turns_cell(cell: str) -> str:
    """The field of `WORK` that counts the jobs ever placed in a cell: a job's `turn` is the count before it."""
    return f"{cell}|{TURNS}"


open_key = _prefix("taxiway:open:")
"""Sorted set of the `job_key`s of a tenant with a `max_depth` that have not ended, by when their records expire."""


def held_cell(hardware_class: str, level: int) -> str:
    """The field of `WORK` that counts the jobs of one level that wait in holding for a class."""
    return f"{WAITING}|{work_cell(hardware_class, level)}"


holding_key = _prefix(f"{HOLDING}:")
"""Sorted set of the `job_key`s in a holding queue, by deadline; jobs without one come last, in arrival order."""


def arrived_cell(hardware_class: str, model: str) -> str:
    """The field of `WORK` that counts all rows of a model that ever arrived at a class; `model` is `name:version`."""
    return f"{ARRIVED}|{flow(hardware_class, model)}"


def flow(hardware_class: str, model: str) -> str:
    """The name of a model's traffic to a class."""
    return f"{hardware_class}|{model}"


def lengths_cell(model: str, tenant: str) -> str:
    """The field of `LENGTHS` for a model (`name:version`) and a tenant."""
    return f"{model}|{tenant}"


spent_key = _prefix("taxiway:spent:")
"""Hash of tenant to the US dollars that its jobs placed on `day` cost; the day is a date by the store's clock."""

learned_key = _prefix("taxiway:learned:")
"""What workers learned of the times of the endpoint at this address (`workers.endpoints.variants`)."""

line_key = _prefix("taxiway:line:")
"""Where a connection of this peer waits for work (`taxiway.contract.peers.WaitingLine`), in JSON."""

history_key = _prefix("taxiway:history:")
"""Hash of a slice's begin, in Unix seconds, to its arrivals (`tasks.history`); `hour` is its UTC hour."""

unserved_key = _prefix("taxiway:unserved:")
"""Hash of what requests asked for (`tasks.history.UnservedTerms`) to how many were refused for lack of hardware
in the slice that begins then."""

BATCHES_OPEN = "taxiway:batches-open"
"""Sorted set of the batches that have not ended, each as its id, a space and its tenant, by the time it was made."""

OBJECTS_EXPIRING = "taxiway:objects-expiring"
"""Sorted set of the files, batches and responses that expire, and of contents of files that have no record yet, by the
Unix time at which they do."""

RESPONSES_OPEN = "taxiway:responses-open"
"""Sorted set of the responses in the background that have not ended, by the time they were made."""

_PLURALS = {"file": "files", "batch": "batches", "response": "responses"}


def object_key(kind: str, name: str) -> str:
    """What is known of a `file`, `batch` or `response` of OpenAI's API."""
    return f"taxiway:{kind}:{name}"


def objects_key(kind: str, tenant: str) -> str:
    """Sorted set of a tenant's files or batches by the time they were made, or of its responses by their last use."""
    return f"taxiway:{_PLURALS[kind]}:{tenant}"


stored_key = _prefix("taxiway:stored:")
"""Hash of the bytes that a tenant's files, batches and responses take (`api.storage.objects.Count`)."""

tenant_batches_key = _prefix("taxiway:tenant-batches:")
"""Set of a tenant's batches that have not ended."""

WEBHOOKS = "taxiway:webhooks"
"""Hash of a webhook endpoint's id to what is known of it, its secrets included."""

WEBHOOKS_DUE = "taxiway:webhooks-due"
"""Sorted set of the endpoints whose outbox has events, by the time of the next attempt, on the store's clock."""

webhook_mark_key = _prefix("taxiway:webhook-mark:")
"""Present for a day after an event of a batch or response was added to outboxes."""

webhook_outbox_key = _prefix("taxiway:webhook-outbox:")
"""List of the events that wait for an endpoint, first come first."""

webhook_dead_key = _prefix("taxiway:webhook-dead:")
"""List of the events that an endpoint did not take in time, latest first."""

webhook_state_key = _prefix("taxiway:webhook-state:")
"""Hash of an endpoint's delivery in progress: its fencing token, and the attempts and last fault of the event."""

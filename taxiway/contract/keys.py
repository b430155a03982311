"""Names of everything that taxiway keeps in the broker and in the state store. No other file spells one."""

from __future__ import annotations

ARRIVALS = "taxiway.arrivals"
"""The queue that producers write."""

INFER = "taxiway.infer"
"""The task that runs a request."""

CANCEL = "taxiway.cancel"
"""The message that asks a router to cancel a job."""

LEVELS = 4
"""Priority levels of a queue; 0 is served first."""

PATIENT = 2
"""The first of the levels whose work nobody waits for: what is due in more than ten minutes, or never."""

DEVICES = "taxiway:devices"
"""Hash of worker name to device facts; `HEARTBEATS` holds when each was written, by the store's clock."""

WORK = "taxiway:work"
"""Hash of cell (`work_cell`) to the seconds of device time placed there and not finished, of `held_cell` to those that
wait in holding, and of `arrived_cell` to the rows that ever arrived for a model at a class."""

ARRIVED = "rows"
"""What stands for a hardware class in the cells that count arrived rows."""

LENGTHS = "taxiway:lengths"
"""Hash of `lengths_cell` to the recent lengths of that model's answers to that tenant (`tasks.models.lengths`)."""

HOLDING = "taxiway:holding"
"""Set of the holding queues that have jobs; each is kept at its `holding_key`."""

HELD = "taxiway:held"
"""Hash of a held job's `job_key` to its message."""

RELEASED = "taxiway:released"
"""Sorted set of `job_key` by when a job that a router took out of holding, and did not place, goes back."""

DEADLINES = "taxiway:deadlines"
"""Sorted set of groups of `job_key`s, as MessagePack, by the deadline that their jobs have, on the store's clock."""

ACCEPTED = "taxiway:accepted"
"""Sorted set of groups of `job_key`s, as MessagePack, by when their jobs were accepted, on the store's clock: the index
of all jobs. A group is forgotten with the last of its records."""

COUNT = "jobs"
"""What stands behind a cell of `WORK` in the field that counts its jobs: no release takes it for a level."""

TURNS = "turns"
"""What stands behind a cell of `WORK` in the field that counts the jobs that were ever placed there."""

WAITING = "held"
"""What stands before a hardware class in the cells that count the device seconds held for it."""

STARTS = "taxiway:starts"
"""Hash of hardware class to when, by the store's clock, somebody last said that they start devices of it."""

HEARTBEATS = "taxiway:heartbeats"
SESSIONS = "taxiway:sessions"
"""Sorted set of routers' sessions under which arrivals may be in flight, by their last sign on the broker's clock."""

RELOADS = "taxiway:reloads"
"""How often somebody asked that all processes look at their models folder."""

CATALOGUES = "taxiway:catalogues"
"""Hash of a router's or worker's name to what it serves; `CATALOGUES_SEEN` has when it last said so."""

CATALOGUES_SEEN = "taxiway:catalogues-seen"

LEAD = "taxiway:lead"
"""The fencing token of the router that leads, while its lease lasts; `LEADS` counts how often it changed hands."""

LEADS = "taxiway:leads"

MOVES = "taxiway:moves"
"""List of the last moves of waiting work, the latest first."""

MODELS = "taxiway:models"
"""What the routers' catalogue can run, as `GET /v2/models` lists it; JSON, for clients of the broker."""

UNACKED = ("unacked", "unacked_index")
"""kombu's hash of messages that were taken and not acknowledged, and its index by time."""

DEFAULT_QUEUE = "celery"
"""Where Celery sends a task for which its producer names no queue."""

DEAD = "taxiway.dead"
"""List of the messages that were given up, the latest first, each with its reason."""

_SEPARATOR = "\x06\x16"
_STEP = 3
_URGENT = 5  # from here on quorum queues serve a message before others


def priority_list(queue: str, level: int) -> str:
    """The Valkey list that holds `queue`'s messages of `level`, where kombu keeps it."""
    return f"{queue}{_SEPARATOR}{level * _STEP}" if level else queue


def priority_lists(queue: str) -> list[str]:
    """All lists of `queue`, first served first."""
    return [priority_list(queue, level) for level in range(LEVELS)]


def redis_priority(level: int) -> int:
    """Celery's number for `level` on Valkey and Redis: 0 is highest."""
    return level * _STEP


def amqp_priority(level: int) -> int:
    """AMQP's number for `level`: larger is higher.

    The first level's is what quorum queues, which know two, serve first; classic queues take it for their highest.
    """
    return _URGENT if level == 0 else LEVELS - 1 - level


def result_key(job: str) -> str:
    """Where Celery's result backend keeps a result, and the channel it announces it on."""
    return f"celery-task-meta-{job}"


def submission_id(submission: str) -> str:
    """What stands for a job's id where a submitter is told whether a job is the one that it asked for."""
    return f"submission.{submission}"


def job_key(job: str) -> str:
    """Hash of a job's record."""
    return f"taxiway:job:{job}"


def blob_key(ref: str) -> str:
    """The bytes of a value that a message refers to."""
    return f"taxiway:blob:{ref}"


def stream_key(job: str) -> str:
    """Stream of the pieces of a job's answer, of one that is told as it is generated."""
    return f"taxiway:stream:{job}"


def room_key(worker: str) -> str:
    """What a worker that waits for messages still has room for."""
    return f"taxiway:room:{worker}"


def kept_key(worker: str) -> str:
    """What a worker writes to learn whether all that was written before is kept."""
    return f"taxiway:kept:{worker}"


def withdrawn_channel(worker: str) -> str:
    """The channel on which a worker hears of jobs that it holds, and that were ended for it."""
    return f"taxiway:withdrawn:{worker}"


def reply_channel(client: str) -> str:
    """The channel on which a client hears all its results."""
    return f"taxiway:reply:{client}"


def session_key(session: str) -> str:
    """Present while a router's session lasts."""
    return f"taxiway:session:{session}"


def snapshot_key(snapshot: str) -> str:
    """A fleet snapshot that placements were decided from."""
    return f"taxiway:snapshot:{snapshot}"


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
    """The field of `WORK` that counts the jobs ever placed in a cell: a job's `turn` is how many were before it."""
    return f"{cell}|{TURNS}"


def tenant_cell(tenant: str) -> str:
    """The field of `WORK` that counts a tenant's jobs that have not ended, of a tenant whose depth is bounded."""
    return f"{tenant}|tenant"


def held_cell(hardware_class: str, level: int) -> str:
    """The field of `WORK` that counts the jobs of one level that wait in holding for a class."""
    return f"{WAITING}|{work_cell(hardware_class, level)}"


def holding_key(queue: str) -> str:
    """Sorted set of the `job_key`s in a holding queue, by deadline; those without one come last, as they arrived."""
    return f"{HOLDING}:{queue}"


def arrived_cell(hardware_class: str, model: str) -> str:
    """The field of `WORK` that counts a model's rows at a class since ever; `model` is `name:version`."""
    return f"{ARRIVED}|{flow(hardware_class, model)}"


def flow(hardware_class: str, model: str) -> str:
    """The name of a model's traffic to a class."""
    return f"{hardware_class}|{model}"


def lengths_cell(model: str, tenant: str) -> str:
    """The field of `LENGTHS` for a model (`name:version`) and a tenant."""
    return f"{model}|{tenant}"


def spent_key(day: str) -> str:
    """Hash of tenant to the US dollars that its jobs placed on `day` cost; the day is a date by the store's clock."""
    return f"taxiway:spent:{day}"

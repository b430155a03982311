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

DEVICES = "taxiway:devices"
"""Hash of worker name to device facts; `HEARTBEATS` holds when each was written, by the store's clock."""

WORK = "taxiway:work"
"""Hash of cell (`work_cell`) to the seconds of device time placed there and not finished, and of `arrived_cell` to the
rows that ever arrived for a model at a class."""

ARRIVED = "rows"
"""What stands for a hardware class in the cells that count arrived rows."""

LENGTHS = "taxiway:lengths"
"""Hash of `lengths_cell` to how long that model's answers to that tenant were lately, as `tasks.lengths` reads it."""

HEARTBEATS = "taxiway:heartbeats"
ROUTERS = "taxiway:routers"
"""Set of routers that may hold messages they took."""

DEAD = "taxiway.dead"
"""List of the messages that were given up, the latest first, each with its reason."""

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


def amqp_priority(level: int) -> int:
    """AMQP's number for `level`: larger is higher."""
    return LEVELS - 1 - level


def result_key(job: str) -> str:
    """Where Celery's result backend keeps a result, and the channel it announces it on."""
    return f"celery-task-meta-{job}"


def job_key(job: str) -> str:
    """Hash of a job's record."""
    return f"taxiway:job:{job}"


def claim_key(job: str) -> str:
    """The claim of the worker that runs a job; it ends with its lease."""
    return f"taxiway:claim:{job}"


def reply_channel(client: str) -> str:
    """The channel on which a client hears all its results."""
    return f"taxiway:reply:{client}"


def router_key(router: str) -> str:
    """Present while the router lives."""
    return f"taxiway:router:{router}"


def reading_key(reading: str) -> str:
    """A fleet snapshot that placements were decided from."""
    return f"taxiway:reading:{reading}"


def taken_key(router: str) -> str:
    """Hash of the arrivals that a router took and has not placed yet."""
    return f"taxiway:taken:{router}"


def work_cell(hardware_class: str, level: int) -> str:
    """The field of `WORK` that counts a class's jobs of one level."""
    return f"{hardware_class}|{level}"


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

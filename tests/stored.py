"""What a database holds of jobs and devices."""

from typing import Any

import msgspec
import redis

from tasks.heartbeat import DeviceFacts
from taxiway.contract.job import JobRecord, record_from
from taxiway.contract.keys import DEVICES, job_key
from tests.narrowing import as_bytes


def fields_of(client: redis.Redis, key: str) -> dict[str, str]:
    """A hash of texts."""
    return {as_bytes(name).decode(): as_bytes(value).decode() for name, value in client.hgetall(key).items()}


def record_of(client: redis.Redis, job: str) -> JobRecord:
    """A job's record."""
    return record_from(job, fields_of(client, job_key(job)))


def facts_of(client: redis.Redis, worker: str) -> DeviceFacts:
    """What a worker last reported of its device."""
    return msgspec.json.decode(as_bytes(client.hget(DEVICES, worker)), type=DeviceFacts)


def all_facts(client: redis.Redis) -> list[DeviceFacts]:
    """What each worker last reported of its device."""
    return [msgspec.json.decode(as_bytes(raw), type=DeviceFacts) for raw in client.hvals(DEVICES)]


def is_listened_to(client: redis.Redis) -> bool:
    """Whether anybody listens to Celery's events in this database."""
    database = str(client.connection_pool.connection_kwargs["db"])
    clients: list[dict[str, str]] = client.client_list()
    return any(one["db"] == database and one["psub"] != "0" for one in clients)


def scores(client: redis.Redis, key: str) -> dict[bytes, float]:
    """A sorted set's members in order, each with its score."""
    found: Any = client.zrange(key, 0, -1, withscores=True)
    return {as_bytes(name): float(score) for name, score in found}

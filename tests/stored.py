"""What a database holds, as bytes and text. redis-py's types also name text, which only a client that decodes gives."""

from __future__ import annotations

import redis

from taxiway.contract.job import JobRecord, record_from
from taxiway.contract.keys import job_key


def as_bytes(value: object) -> bytes:
    """A command's answer that must be bytes."""
    assert isinstance(value, bytes), value
    return value


def fields_of(client: redis.Redis, key: str) -> dict[str, str]:
    """A hash of texts."""
    return {as_bytes(name).decode(): as_bytes(value).decode() for name, value in client.hgetall(key).items()}


def record_of(client: redis.Redis, job: str) -> JobRecord:
    """A job's record."""
    return record_from(job, fields_of(client, job_key(job)))

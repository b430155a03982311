"""Writes what a client, a router and a worker of this release leave in the broker and the state store."""

from __future__ import annotations

import tempfile
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import redis

from broker.valkey.worker_store import WorkerStore
from local.embedded import EmbeddedValkey
from tasks.queues.limits import Limits
from tasks.settings import TREE, Settings, settings_from
from taxiway import Client
from taxiway.contract.keys import ARRIVALS, DEAD, DEVICES, job_key, priority_lists, result_key, stream_key
from taxiway.contract.stream import Piece
from tests.routing import EchoDevice, eventually, router_process
from tests.working import CLASS, worker_process, worker_settings

SECRET = bytes(range(32)).hex()
"""Signs what is recorded; it keeps nothing else."""

INPUTS = {"flight": "TX 42", "gates": [3, 7], "delayed": False}


def main() -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as name, EmbeddedValkey(Path(name) / "valkey") as server:
        base = settings_from({"TAXIWAY_BROKER": server.url, "TAXIWAY_SECRET": SECRET})
        with redis.Redis.from_url(server.url, decode_responses=True) as store, Client(server.url) as client:
            recorded = record(worker_settings(base, Path(name)), store, client)
    version = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]["version"]
    path = Path(__file__).parent / f"{version}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(recorded)) + b"\n")


def record(settings: Settings, store: Any, client: Client) -> dict[str, Any]:
    """What was written of a few jobs, by what it is."""
    recorded: dict[str, Any] = {}
    job = client.submit("echo", INPUTS, deadline=600, tenant="lab", priority="high").id
    failed = client.submit("nobody-has-it", "a").id
    client.job("unknown").cancel()
    arrived = store.lrange(priority_lists(ARRIVALS)[0], 0, -1)
    recorded["cancellation"], _, recorded["arrival"] = arrived
    store.rpush(ARRIVALS, "this is no message")
    with router_process(settings):
        with EchoDevice(settings, answering=False):
            eventually(lambda: store.exists(job_key(job), result_key(failed), DEAD) == 3)
            (recorded["order"],) = [message for name in priority_lists(CLASS) for message in store.lrange(name, 0, -1)]
            recorded["record"] = store.hgetall(job_key(job))
            recorded["failure"], recorded["letter"] = store.get(result_key(failed)), store.lindex(DEAD, 0)
        with worker_process(settings) as worker:
            eventually(lambda: store.exists(result_key(job)))
            recorded["result"], recorded["ended"] = store.get(result_key(job)), store.hgetall(job_key(job))
            recorded["facts"] = eventually(
                lambda: (facts := store.hget(DEVICES, worker.name)) and "done" in facts and facts
            )
    WorkerStore(settings.broker, "worker", Limits()).append([(job, Piece(1, 4, "two "))])
    ((_, recorded["piece"]),) = store.xrange(stream_key(job))
    return recorded


if __name__ == "__main__":
    main()

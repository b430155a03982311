"""`python -m tests.chaos.storm`: what is accepted survives failovers one after another.

A primary with three replicas and three sentinels, each server behind a cable that all others use, has shipped routers
and workers. While producers submit with `durability: replicated`, the primary is killed, frozen until another leads, or
cut off from everybody, and replicas are killed, 20 times in turn. At the end each job that was accepted must have its
result: a sentinel could always reach a replica that had confirmed it.
"""

from __future__ import annotations

import argparse
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import redis

from tasks.settings import Settings, settings_from
from taxiway import Client, FleetUnavailable
from taxiway.contract.job import FINAL, JobState
from taxiway.contract.keys import job_key, result_key
from taxiway.contract.wire import Durability
from tests.routing import router_process
from tests.sentinels import ServerSet
from tests.waiting import until
from tests.working import QUEUES, worker_process, worker_settings

REPLICAS = 3
CONFIRM = 2  # a majority of the four servers, the primary included
FAULTS = ("kill the primary", "freeze the primary", "cut the primary off", "kill a replica")
DOWN_AFTER = 1.5  # seconds of silence after which a sentinel takes a server for gone


class Producers:
    """Threads that submit until stopped, by the broker and by a router; what each saw accepted is noted."""

    def __init__(self, broker: str, http: str) -> None:
        self.accepted: dict[str, float] = {}
        self.refused = 0
        self._stopping = threading.Event()
        interfaces = (broker, broker, http)
        self._threads = [threading.Thread(target=self._submit, args=(interface,)) for interface in interfaces]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Submit no more."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _submit(self, interface: str) -> None:
        durability: Durability = "written" if interface.startswith("http") else "replicated"  # a router decides itself
        with Client(interface, durability=durability, replicas=REPLICAS) as client:
            number = 0
            while not self._stopping.wait(0.01):
                number += 1
                try:
                    job = client.submit("echo", number)
                except FleetUnavailable:
                    self.refused += 1
                else:
                    self.accepted[job.id] = time.time()


def inject(servers: ServerSet, fault: str, chance: random.Random) -> None:
    """Inject a fault, and repair it once another server leads, or after some seconds."""
    primary = servers.primary()
    if fault == "kill a replica":
        victim = chance.choice([server for server in servers.servers if server is not primary])
        victim.kill()
        time.sleep(DOWN_AFTER)
    elif fault == "kill the primary":
        victim = primary
        victim.kill()
        servers.await_failover(primary)
    elif fault == "freeze the primary":
        primary.signal(signal.SIGSTOP)
        servers.await_failover(primary)
        servers.await_followers(REPLICAS - 1)  # before, those that still follow it could confirm what they then drop
        primary.signal(signal.SIGCONT)  # it takes itself for the primary, until a sentinel tells it otherwise
        return
    else:
        primary.cable.pull()
        servers.await_failover(primary)
        servers.await_followers(REPLICAS - 1)  # as above
        primary.cable.plug()
        return
    victim.start()
    victim.set_up()


def lost(servers: ServerSet, accepted: dict[str, float]) -> list[str]:
    """The accepted jobs that never get a result."""
    left = dict.fromkeys(accepted)

    def ended() -> bool:
        with suppress(redis.RedisError), servers.primary().client() as client:
            for job in [*left]:
                state = client.hget(job_key(job), "state")
                if client.exists(result_key(job)) or (state and JobState(state.decode()) in FINAL):
                    del left[job]
        return not left

    until(ended, timeout=180, every=1)
    return [*left]


def settings_of(servers: ServerSet, folder: Path) -> Settings:
    """A small fleet that accepts what a majority of the servers has."""
    base = settings_from({"TAXIWAY_BROKER": servers.url, "TAXIWAY_SECRET": secrets.token_hex(32)})
    limits = f"{{lease: 2, durability: replicated, replicas: {REPLICAS}, requests_per_second: 100000}}"
    folder.mkdir()
    return worker_settings(base, folder, QUEUES.replace("{lease: 1}", limits))


def main() -> int:
    """Run once, and print a line; 1 if an accepted job was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.storm", description=__doc__)
    parser.add_argument("--faults", type=int, default=20, help="how many, one after another (20)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    given = parser.parse_args()
    began, chance, injected = time.monotonic(), random.Random(given.seed), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="storm-") as name, ExitStack() as stack:
        servers = ServerSet(Path(name), stack, replicas=REPLICAS, down_after=DOWN_AFTER, confirm=CONFIRM)
        fleet = settings_of(servers, Path(name) / "fleet")
        router = stack.enter_context(router_process(fleet, subprocess.DEVNULL))
        stack.enter_context(worker_process(fleet, log=subprocess.DEVNULL))
        producers = Producers(servers.url, router.http)
        try:
            for number in range(given.faults):
                fault = FAULTS[number % len(FAULTS)]
                time.sleep(chance.uniform(0.5, 3))
                inject(servers, fault, chance)
                injected[fault] += 1
                servers.await_whole()
        finally:
            producers.stop()
        missing = lost(servers, producers.accepted)
    line = {
        "question": "accepted jobs lost in failovers with durability: replicated",
        "seed": given.seed,
        "seconds": round(time.monotonic() - began),
        "accepted": len(producers.accepted),
        "refused": producers.refused,
        "faults": dict(injected),
        "lost": len(missing),
    }
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())

"""Malformed messages to a router and a worker: both go on, dead letters stay bounded, and a good job still runs.

`python -m tests.fuzzing.broker --messages 1000000` writes half of them to the arrivals and half to a class's queue,
where a producer's account, or who stole a worker's, could.
"""

import sys
import tempfile
import time
from pathlib import Path

import redis

import taxiway
from tasks.settings import Settings
from taxiway.contract.job import FINAL
from taxiway.contract.keys import ARRIVALS, DEAD, job_key, priority_lists
from tests.forked import Process
from tests.fuzzing.malformed import Malformed
from tests.fuzzing.session import a_store, options
from tests.routing import RouterProcess, router_process
from tests.working import CLASS, Tower, WorkerProcess, worker_process, worker_settings

BATCH = 500
ROOM = 5_000
"""Messages that may wait in a queue before the next batch."""

KEPT = 10_000
"""Dead letters that are kept."""


def main() -> int:
    """Run; 1 where a process ended, a message was lost in its queue, or the good job was not answered."""
    given = options("broker", __doc__, messages=1_000_000)
    with tempfile.TemporaryDirectory() as name, a_store(Path(name)) as base:
        settings = worker_settings(base, Path(name))
        with (
            (Path(name) / "log").open("wb") as log,
            router_process(settings, log) as router,
            worker_process(settings, log=log) as worker,
        ):
            began = time.monotonic()
            faults = attack(settings, router, worker, given.messages, given.seed)
            seconds = time.monotonic() - began
    sys.stdout.write(
        f"{given.messages} malformed messages, seed {given.seed}: {seconds:.0f} s, "
        f"{given.messages / seconds:.0f} a second; {'; '.join(faults) or 'router and worker went on'}\n"
    )
    return int(bool(faults))


def attack(settings: Settings, router: RouterProcess, worker: WorkerProcess, messages: int, seed: int) -> list[str]:
    """Write so many messages, wait until they are gone; what went wrong."""
    processes: dict[str, Process] = {"router": router.process, "worker": worker.process}
    supply = Malformed(seed, _old_ticket(settings))
    with redis.Redis.from_url(settings.broker) as broker:
        for start in range(0, messages, 2 * BATCH):
            half = min(BATCH, (messages - start + 1) // 2)
            for queue in (ARRIVALS, CLASS):
                broker.lpush(queue, *(supply.message() for _ in range(half)))
                _await_room(broker, queue, ROOM, processes)
        for queue in (ARRIVALS, CLASS):
            _await_room(broker, queue, 0, processes)
        kept, endless = broker.llen(DEAD), _unended(broker)
    ended = [f"the {name} ended" for name, process in processes.items() if process.poll() is not None]
    with taxiway.Client(settings.broker) as client:
        answered = client.submit("echo", "good", deadline=30).result(timeout=40).outputs == {"payload": "good"}
    ended += [f"job {job!r} never ends" for job in endless[:5]]
    return [*ended, *([] if answered else ["a wrong answer"]), *([f"{kept} dead letters"] if kept > KEPT else [])]


def _old_ticket(settings: Settings) -> str:
    """The ticket of a message that was good once."""
    with Tower(settings) as tower:
        return str(tower.message("echo", "a").headers["taxiway"])


def _unended(broker: redis.Redis, *, timeout: float = 30.0) -> list[str]:
    """The jobs that a router accepted and that do not end, though their deadlines have passed long ago."""
    end = time.monotonic() + timeout
    left = list(broker.scan_iter(job_key("*"), count=1000))
    while left and time.monotonic() < end:
        with broker.pipeline(transaction=False) as pipeline:
            for key in left:
                pipeline.hmget(key, "state", "accepted")
            answer = pipeline.execute()
        left = [key for key, (state, at) in zip(left, answer, strict=True) if at and state.decode() not in FINAL]
        time.sleep(0.1)
    return [key.decode(errors="replace") for key in left]


def _await_room(
    broker: redis.Redis, queue: str, most: int, processes: dict[str, Process], *, timeout: float = 120.0
) -> None:
    """Wait until at most so many messages wait in the queue.

    Raises:
        TimeoutError: a process stands still, or ended.
    """
    end = time.monotonic() + timeout
    while sum(int(broker.llen(name)) for name in priority_lists(queue)) + _held(broker, most) > most:
        if time.monotonic() > end or any(process.poll() is not None for process in processes.values()):
            raise TimeoutError(f"{queue} is not emptied: {broker.llen(queue)} messages wait")
        time.sleep(0.01)


def _held(broker: redis.Redis, most: int) -> int:
    """Messages that a worker took and has not answered; they count in the end alone."""
    return int(broker.hlen("unacked")) if most == 0 else 0


if __name__ == "__main__":
    sys.exit(main())

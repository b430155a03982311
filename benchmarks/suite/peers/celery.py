"""Plain Celery: one task a request, as careful as the fleet: late acknowledgement, events on, results kept.

Its worker learns where the broker and the results are from Celery's own CELERY_BROKER_URL and CELERY_RESULT_BACKEND.
`batched` is what one does about batches: tasks wait in threads for a thread that runs what has come together.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from celery import Celery

from benchmarks.suite.batch_loop import BatchLoop, open_loop
from benchmarks.suite.workloads import KEEP


def run(payload: Any) -> Any:
    """The model's answer, in a batch of one."""
    return _loop()([payload])[0]


def batched(payload: Any) -> Any:
    """The model's answer, in a batch with what other threads wait for."""
    waiting: Future[Any] = Future()
    _batcher().put((payload, waiting))
    return waiting.result()


def plain_app(**settings: Any) -> Celery:
    """An app with both tasks, for the worker or for a client."""
    made = Celery("plain", set_as_current=False, **settings)
    made.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_send_task_events=True,
        task_send_sent_event=True,
        result_expires=KEEP,
        broker_connection_retry_on_startup=True,
    )
    made.task(name="plain.run")(run)
    made.task(name="plain.batched")(batched)
    return made


_opening = threading.Lock()


def _loop() -> BatchLoop:
    with _opening:
        return _open_once()


def _batcher() -> queue.SimpleQueue[tuple[Any, Future[Any]]]:
    with _opening:
        return _start_batcher()


@functools.cache
def _open_once() -> BatchLoop:
    return open_loop()


@functools.cache
def _start_batcher() -> queue.SimpleQueue[tuple[Any, Future[Any]]]:
    arrivals: queue.SimpleQueue[tuple[Any, Future[Any]]] = queue.SimpleQueue()
    threading.Thread(target=_run_batches, args=(open_loop(), arrivals), daemon=True).start()
    return arrivals


def _run_batches(loop: BatchLoop, arrivals: queue.SimpleQueue[tuple[Any, Future[Any]]]) -> None:
    while True:
        batch = list(_together(arrivals, loop.rows, loop.workload.wait))
        for (_, waiting), answer in zip(batch, loop([payload for payload, _ in batch]), strict=True):
            waiting.set_result(answer)


def _together(
    arrivals: queue.SimpleQueue[tuple[Any, Future[Any]]], rows: int, wait: float
) -> Iterator[tuple[Any, Future[Any]]]:
    """The next arrival, and those that follow it within `wait` seconds of one another."""
    yield arrivals.get()
    try:
        for _ in range(rows - 1):
            yield arrivals.get(timeout=wait) if wait else arrivals.get_nowait()
    except queue.Empty:
        return


app = plain_app()

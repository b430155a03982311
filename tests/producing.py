"""What producers send that have no client of ours: plain Celery, and HTTP."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from celery import Celery
from celery.canvas import Signature
from celery.result import AsyncResult
from kombu import Exchange, Queue, pools

from tasks.settings import Settings
from taxiway.contract.keys import ARRIVALS, INFER
from tests.waiting import in_thread

_KEPT = {"x-queue-type": "quorum", "x-delivery-limit": -1}
QUORUM = Queue(ARRIVALS, Exchange(ARRIVALS), ARRIVALS, queue_arguments=_KEPT)
"""RabbitMQ's arrivals as docs/celery.md recommends that producers declare them."""


@contextmanager
def producing(fleet: Settings, broker: str = "") -> Iterator[Celery]:
    """Plain Celery before a fleet, whose broker is the fleet's own or another; infer goes to the arrivals."""
    pools.reset()  # else it shares connections that earlier apps left, which the server may have closed
    app = Celery("lab", broker=broker or fleet.broker, backend=fleet.broker, set_as_current=False)
    app.conf.task_routes = {INFER: {"queue": ARRIVALS}}
    yield app
    gc.collect()  # an AsyncResult that is left unsubscribes when it is collected: now, while the server is there
    stop_listening(app)
    app.close()
    gc.collect()


def stop_listening(app: Celery) -> None:
    """End the connections that an app waits for results on: else they end with errors when it is collected."""
    backend: Any = app.backend
    backend.result_consumer.stop()
    backend.client.connection_pool.disconnect()


@contextmanager
def hearing(app: Celery, hear: Callable[[Any], object]) -> Iterator[None]:
    """Call `hear` with each of Celery's events until the block ends."""
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": hear})
        stop = partial(setattr, receiver, "should_stop", True)
        with in_thread(lambda: receiver.capture(limit=None, timeout=None, wakeup=False), stop=stop):
            yield


def infer(producer: Celery, inputs: Any, model: str = "echo") -> Signature[Any]:
    """A request that is due in a minute."""
    return producer.signature(INFER, kwargs={"model": model, "inputs": inputs, "deadline": 60}, queue=ARRIVALS)


def payload(answer: AsyncResult[Any]) -> Any:
    """What `echo` answers."""
    return answer.get(timeout=60)["outputs"]["payload"]


def infer_body(*rows: Any, **terms: Any) -> dict[str, Any]:
    """An infer request to `echo` under these terms, as a JSON value."""
    payload = {"name": "payload", "shape": [len(rows)], "datatype": "BYTES", "data": list(rows)}
    return {"inputs": [payload], "parameters": terms}

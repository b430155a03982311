"""The worker's Celery app: `celery -A workers.app worker` serves the class in TAXIWAY_CLASS."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import click
from celery import Celery, signals
from celery.app.task import Task
from celery.exceptions import SecurityWarning
from kombu import compression, disable_insecure_serializers

from tasks.celery_app import make_app
from tasks.models.folder import ModelsFolder
from tasks.queues.hours import serves_in
from tasks.queues.queues_file import QueuesFile
from tasks.queues.sealing import open_seal_keys
from tasks.settings import settings_from
from tasks.telemetry import log_to_stderr, start_tracing, withhold
from taxiway.contract.keys import INFER
from taxiway.errors import TaxiwayError
from workers.celery_adapter.consumer import SHOWN, Fetching, GroupedEvents, LoneConsumer
from workers.celery_adapter.pool import DevicePool
from workers.celery_adapter.strategy import (
    ENDED,
    BridgedAMQP,
    WriteOnceBackend,
    WriteOnceSentinelBackend,
    bind_context,
    context_of,
    ordered,
)
from workers.device import WorkerContext, options_from
from workers.heartbeat import worker_name

_CLOCK_CHECK = 30.0  # seconds of one sleep until a class opens: the clock may be set meanwhile


def make_worker_app(environment: Mapping[str, str]) -> Celery:
    """The app of a worker that `environment` describes (`tasks.settings`, `workers.device.options_from`).

    Raises:
        SettingsError: a variable is missing or wrong.
        TopologyError: queues.yaml is invalid. An invalid model is only disabled.
    """
    settings = settings_from(environment)
    folder = ModelsFolder(settings.models, QueuesFile(settings.queues))
    topology = folder.queues.topology
    options = options_from(environment, topology)
    context = WorkerContext(options, settings, topology, folder, open_seal_keys(settings.seals, topology))
    _read_plainly()
    warnings.filterwarnings("ignore", category=SecurityWarning)  # of root, for no message may hold code here
    backend = WriteOnceSentinelBackend if "+sentinel://" in settings.broker else WriteOnceBackend
    made = make_app(settings, topology, backend=_path(backend))
    made.amqp_cls = _path(BridgedAMQP)
    made.conf.update(
        worker_pool=_path(DevicePool),
        worker_consumer=_path(LoneConsumer),
        worker_concurrency=1,
        worker_redirect_stdouts=False,
        worker_disable_rate_limits=True,
    )
    made.amqp.queues.select([options.hardware_class])  # Celery's remote control can add others
    made.steps["consumer"].update((Fetching, GroupedEvents))
    bind_context(made, context)
    made.task(bind=True, name=INFER, throws=(TaxiwayError,), acks_late=True, resultrepr_maxsize=SHOWN)(infer)
    made.finalize()
    for task in made.tasks.values():
        task.Strategy = _path(ordered)
    return made


def serve(app: Celery, loglevel: str, name: str = "") -> int:
    """Run the app's worker until it is stopped; returns its exit status. Prints one line of JSON when ready.

    Its name is made of its class, its device and this machine's name unless it is given. Outside the hours of its class
    it waits.
    """
    options = context_of(app).options
    label = options.device or f"{context_of(app).hardware.device}:0"
    name = worker_name(name, f"{options.hardware_class}.{label.replace(':', '-')}")
    ready = {"ready": "worker", "worker": name, "device": label, "emulated": options.emulate}
    filters = [withhold] if context_of(app).settings.seals else []
    signals.setup_logging.connect(lambda **_: log_to_stderr(loglevel, *filters), weak=False)

    @signals.worker_ready.connect(weak=False)
    def say_ready(**_: Any) -> None:
        click.echo(json.dumps(ready))

    wait_until_open(context_of(app), ready)
    worker = app.Worker(hostname=name, loglevel=loglevel, task_events=True, quiet=True)
    worker.start()
    return int(worker.exitcode or 0)


def wait_until_open(context: WorkerContext, ready: Mapping[str, object]) -> None:
    """Wait for the hours in which the class serves; the line of JSON that is printed meanwhile says when they begin."""
    available, grace = context.hardware.available, context.topology.limits.grace
    if left := serves_in(available, time.time(), grace):
        opens = datetime.fromtimestamp(time.time() + left, UTC).isoformat(timespec="seconds")
        click.echo(json.dumps({**ready, "opens": opens}))
    while left := serves_in(available, time.time(), grace):
        time.sleep(min(left, _CLOCK_CHECK))


def _read_plainly() -> None:
    """Make kombu accept only uncompressed JSON: it decodes messages before their ticket is checked."""
    disable_insecure_serializers(["json"])
    for name in compression.encoders():
        compression.register(_refuse, _refuse, name)


def _refuse(_: bytes) -> bytes:
    raise ValueError("compressed messages are not accepted")


def infer(task: Task[Any, Any], *_args: Any, **_kwargs: Any) -> Any:
    """Return the outcome of one request. The device has already run it: the outcome is in Celery's task request."""
    return getattr(task.request, ENDED).unwrap()


def _path(thing: Any) -> str:
    return f"{thing.__module__}:{thing.__qualname__}"


app = make_worker_app(os.environ)
start_tracing("taxiway-worker", os.environ)

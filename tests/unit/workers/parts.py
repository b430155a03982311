"""Parts of a worker, of which a test names only what it is about."""

from pathlib import Path
from typing import Any

from broker.valkey.worker_store import WorkerStore
from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.models.model import Model
from tasks.queues.limits import Limits
from tasks.settings import TREE
from tasks.ticket import Ticket
from tasks.topology import HardwareClass
from tests.builders import a_class, a_ticket
from tests.celery_double import NoCelery, NoQueue
from workers.device import find_device
from workers.drain import Drain
from workers.executor import Executor
from workers.stages.held import HeldJobs
from workers.stages.job import Delivery, RunningJob
from workers.stages.queues import AdmitQueue, EndingQueue, PieceQueue, Shared

MODELS = load_catalogue(TREE / "models")


def an_executor(folder: Path, hardware: HardwareClass | None = None, kind: type[Executor] = Executor) -> Executor:
    """The executor of the first CPU device of a class."""
    hardware = hardware or a_class()
    return kind(hardware, find_device(hardware, "cpu:0", emulate=False), ArtefactStore(folder), threads=1)


def a_delivery(ticket: Ticket | None = None, body: bytes = b"", **fields: Any) -> Delivery:
    """A message with that ticket that came at the beginning of the epoch."""
    ticket = ticket or a_ticket()
    usual: dict[str, Any] = {"received": 0.0, "hardware_class": "cpu.batch"}
    return Delivery(ticket.job, ticket, body, "application/json", **(usual | fields))


def a_running_job(model: str | Model = "echo", **fields: Any) -> RunningJob:
    """A job of one row, of a shipped model or another one."""
    found = MODELS.resolve(model) if isinstance(model, str) else model
    variant = fields.get("variant", found.reference)
    usual: dict[str, Any] = {
        "delivery": a_delivery(),
        "hardware": a_class(),
        "model": found,
        "variant": variant,
        "key": f"{found.id}/{variant}",
        "rows": ({"payload": 1},),
        "parameters": {},
        "outputs": ("payload",),
        "single": True,
        "arrived": 0.0,
    }
    return RunningJob(**(usual | fields))


def no_store(kind: type[WorkerStore] = WorkerStore) -> WorkerStore:
    """A store without a server."""
    return kind("redis://127.0.0.1:1", "w", Limits())


def holding(*deliveries: Delivery, store: WorkerStore | None = None) -> HeldJobs:
    """A worker's held jobs, of which no queue and no Celery knows."""
    held = HeldJobs(store or no_store(), NoQueue(), NoCelery())
    held.hold(deliveries)
    return held


def shared(
    admissions: AdmitQueue | None = None, *, store: WorkerStore | None = None, celery: NoCelery | None = None
) -> Shared:
    """What the stages of a worker share, with a server and Celery only where a test gives them."""
    store = store or no_store()
    return Shared(
        admissions or AdmitQueue(),
        EndingQueue(),
        PieceQueue(),
        store,
        holding(store=store),
        celery or NoCelery(),
        Drain(),
    )

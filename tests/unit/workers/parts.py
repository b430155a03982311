"""Parts of a worker, of which a test names only what it is about."""

from pathlib import Path
from typing import Any

from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.models.model import Model
from tasks.settings import TREE
from tasks.topology import HardwareClass
from tests.builders import a_class, a_delivery
from workers.device import find_device
from workers.executor import Executor
from workers.stages.job import RunningJob

MODELS = load_catalogue(TREE / "models")


def an_executor(folder: Path, hardware: HardwareClass | None = None, kind: type[Executor] = Executor) -> Executor:
    """The executor of the first CPU device of a class."""
    hardware = hardware or a_class()
    return kind(hardware, find_device(hardware, "cpu:0", emulate=False), ArtefactStore(folder), threads=1)


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

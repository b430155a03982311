"""A worker process's configuration: its hardware class, device label and files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tasks.endpoints import Endpoint
from tasks.models.catalogue import Model
from tasks.models.folder import ModelsFolder
from tasks.settings import Settings, SettingsError
from tasks.topology import HardwareClass, Topology
from taxiway.errors import ModelUnavailableError, UnknownModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """The class that a worker serves, and its device. An empty `device` means the first of the class's kind.

    The file `alive`, if set, is touched after each heartbeat that the store accepted. `endpoint_key` is the API key of
    the class's endpoint, if it has one.
    """

    hardware_class: str
    device: str = ""
    emulate: bool = False
    threads: int = 1
    alive: Path | None = None
    endpoint_key: str = field(default="", repr=False)

    def environment(self) -> dict[str, str]:
        """The variables that `options_from` reads these from."""
        return {
            "TAXIWAY_CLASS": self.hardware_class,
            "TAXIWAY_DEVICE": self.device,
            "TAXIWAY_EMULATE": "1" if self.emulate else "",
            "TAXIWAY_THREADS": str(self.threads),
            "TAXIWAY_ALIVE": "" if self.alive is None else str(self.alive),
        }


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """The configuration of one worker process."""

    options: WorkerOptions
    settings: Settings
    topology: Topology
    folder: ModelsFolder

    @property
    def hardware(self) -> HardwareClass:
        """The class that the worker serves."""
        return self.topology.hardware[self.options.hardware_class]

    def warm(self) -> list[Model]:
        """The models that the class keeps warm; those that the catalogue does not serve are logged and skipped."""
        found = []
        for name in self.hardware.warm:
            try:
                found.append(self.folder.catalogue.resolve(name))
            except (UnknownModelError, ModelUnavailableError) as error:
                extra = {"class": self.options.hardware_class, "reason": error.message}
                logger.error("warm model of the class is not served", extra=extra)
        return found


def options_from(environment: Mapping[str, str], topology: Topology) -> WorkerOptions:
    """The options in TAXIWAY_CLASS, TAXIWAY_DEVICE, TAXIWAY_EMULATE, TAXIWAY_THREADS and TAXIWAY_ALIVE.

    The key of an endpoint is in the variable that queues.yaml names.

    Raises:
        SettingsError: a variable is missing or wrong.
    """
    hardware_class = environment.get("TAXIWAY_CLASS", "")
    if hardware_class not in topology.hardware:
        raise SettingsError("TAXIWAY_CLASS", f"one of {sorted(topology.hardware)}", hardware_class or None)
    threads = environment.get("TAXIWAY_THREADS") or "1"
    if not threads.isdecimal() or int(threads) < 1:
        raise SettingsError("TAXIWAY_THREADS", "an integer >= 1", threads)
    alive = Path(environment["TAXIWAY_ALIVE"]) if environment.get("TAXIWAY_ALIVE") else None
    if alive is not None and not alive.parent.is_dir():
        raise SettingsError("TAXIWAY_ALIVE", "a file in a directory that exists", str(alive))
    return WorkerOptions(
        hardware_class=hardware_class,
        device=environment.get("TAXIWAY_DEVICE", ""),
        emulate=environment.get("TAXIWAY_EMULATE", "") not in ("", "0"),
        threads=int(threads),
        alive=alive,
        endpoint_key=_endpoint_key(environment, topology.hardware[hardware_class].endpoint),
    )


def _endpoint_key(environment: Mapping[str, str], endpoint: Endpoint | None) -> str:
    if endpoint is None or endpoint.key_env is None:
        return ""
    key = environment.get(endpoint.key_env, "")
    if not key:
        raise SettingsError(endpoint.key_env, "the API key of the class's endpoint", None)
    return key

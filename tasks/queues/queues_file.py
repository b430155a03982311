"""queues.yaml as a running process sees it: new classes and endpoints are followed, all else needs a restart."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from tasks.models.files import stamp_of
from tasks.topology import HardwareClass, Topology, TopologyError, read_topology

logger = logging.getLogger(__name__)


class PublishedQueues(msgspec.Struct, frozen=True):
    """A fleet's queues.yaml at its broker, for machines that have none (`taxiway join`)."""

    release: str
    """Of taxiway, on its routers."""
    text: str


class QueuesFile:
    """One process's queues.yaml. Thread-safe for one thread that looks and others that read.

    `topology` is what the process goes by: the file as it was at the start, with the endpoints and the new classes of
    the last good one, whose text is `text`. `differs` is whether the file says something else by now, so that a restart
    would change something. `wrong` is why the file is invalid by now, so that no process could start with it; empty if
    it is valid.

    Raises:
        TopologyError: the file is missing or invalid at the start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = stamp_of(path)
        self.topology, self.text = read_topology(path)
        self.differs, self.wrong = False, ""
        self._followers: list[Callable[[Topology], None]] = []

    def follow(self, follower: Callable[[Topology], None]) -> None:
        """Call `follower` with each new topology, on the thread that looks."""
        self._followers.append(follower)

    def look(self) -> bool:
        """Read the file if it changed since the last look; whether `topology` is another one now.

        An invalid file is logged and changes nothing.
        """
        stamp = stamp_of(self.path)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            found, text = read_topology(self.path)
        except TopologyError as error:
            logger.error("queues.yaml is invalid now: the last good one is used", extra={"error": str(error)})
            self.differs, self.wrong = False, str(error)
            return False
        self.text = text
        renewed = followed(self.topology, found)
        self.differs, self.wrong = renewed != found, ""
        if renewed == self.topology:
            return False
        self.topology = renewed
        logger.info("classes or endpoints changed in queues.yaml")
        for follower in self._followers:
            follower(renewed)
        return True


def followed(used: Topology, found: Topology) -> Topology:
    """The topology in use, with the endpoints and the further classes that the file has now.

    A class that is reserved for a service that is not in use yet needs a restart.
    """
    hardware = {name: _with_endpoint(one, found.hardware.get(name)) for name, one in used.hardware.items()}
    services = {None, *used.service}
    new = {name: one for name, one in found.hardware.items() if name not in used.hardware}
    hardware |= {name: one for name, one in new.items() if one.reserve_for in services}
    return used if hardware == used.hardware else msgspec.structs.replace(used, hardware=hardware)


def _with_endpoint(used: HardwareClass, found: HardwareClass | None) -> HardwareClass:
    """The class with the endpoint that the file has; another protocol or variable for the key needs a restart."""
    if used.endpoint is None or found is None or found.endpoint is None:
        return used
    ours, theirs = used.endpoint, found.endpoint
    if (ours.protocol, ours.key_env) != (theirs.protocol, theirs.key_env):
        return used
    return msgspec.structs.replace(used, endpoint=theirs, max_batch=found.max_batch)

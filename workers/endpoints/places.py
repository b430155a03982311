"""Where an endpoint's requests go, as queues.yaml describes it now; what runs ends where it began."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import urlsplit

from tasks.queues.endpoints import Endpoint, connection
from workers.device import Device, DeviceMissingError, endpoint_device
from workers.endpoints.health import EndpointHealth, Target
from workers.endpoints.http import EndpointConfigError
from workers.endpoints.peers import Origin, open_link
from workers.endpoints.protocol import EndpointProtocol
from workers.endpoints.variants import EndpointVariants

logger = logging.getLogger(__name__)


class Places:
    """The `target` of new requests, and those that are left. For one event loop, except for `follow`.

    Args:
        wake: called when the endpoint may get more or less than before.
        resized: called with a description that is followed from now on.

    Raises:
        EndpointConfigError: the endpoint's certificates cannot be read.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        protocol: EndpointProtocol,
        key: str,
        variants: EndpointVariants,
        *,
        stall: float,
        origin: Origin,
        wake: Callable[[], None],
        resized: Callable[[Endpoint], None],
    ) -> None:
        self.endpoint = endpoint
        self._protocol, self._key = protocol, key
        self._variants = variants
        self._stall, self._origin = stall, origin
        self._wake = wake
        self._resized = resized
        self.target = self._target_of(endpoint, variants.device)
        self.gone = ""  # why the endpoint cannot be found
        self._changes: deque[Endpoint] = deque(maxlen=1)
        self._move: asyncio.Task[None] | None = None
        self._left: set[asyncio.Task[None]] = set()

    def follow(self, endpoint: Endpoint) -> None:
        """Go by another description. Thread-safe."""
        self._changes.append(endpoint)
        self._wake()

    def turn(self) -> None:
        """Begin to go where the last description says."""
        if self._changes and (self._move is None or self._move.done()):
            self._move = asyncio.create_task(self._change(self._changes.popleft()))

    @property
    def moves(self) -> list[asyncio.Task[None]]:
        """What still goes on."""
        return [*self._left] if self._move is None else [self._move, *self._left]

    async def _change(self, endpoint: Endpoint) -> None:
        """Go by another description of the endpoint. Where it is elsewhere now, requests go there after a probe."""
        self.gone = ""
        here, target = self._variants.device, self.target
        try:
            device = replace(
                endpoint_device(endpoint, here.label, urlsplit(here.address).port or 0), prices=here.prices
            )
            if connection(endpoint, device.address) != connection(self.endpoint, here.address):
                target = self._target_of(endpoint, device)
        except DeviceMissingError as error:
            self.gone = f"{error} in queues.yaml now"
            return
        except EndpointConfigError as error:
            logger.error("endpoint is used as it was", extra={"reason": str(error)})
            return
        if target is not self.target:
            await target.open_probed()
            self._leave_behind(self.target)
        self.endpoint, self.target = endpoint, target
        self._variants.change(endpoint, device)
        self._variants.announce(target.health)
        self._resized(endpoint)
        target.health.resize(endpoint.slots)

    def _leave_behind(self, target: Target) -> None:
        """Leave a target that gets no more requests, once those that run there have ended."""
        leaving = asyncio.create_task(target.leave())
        self._left.add(leaving)
        leaving.add_done_callback(self._left.discard)

    def _target_of(self, endpoint: Endpoint, device: Device) -> Target:
        link = open_link(endpoint, device.address, self._key, self._stall, self._origin)
        health = EndpointHealth(link, self._protocol, endpoint, self._wake, self._announced)
        return Target(link, health)

    def _announced(self, health: EndpointHealth) -> None:
        if health is self.target.health:
            self._variants.announce(health)

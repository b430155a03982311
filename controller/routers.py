"""What routers report to the operator: how many devices a class should have, and what its devices hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from controller.decide.pools import PodLoss


class Routers:
    """The routers' HTTP API. Methods raise `UNANSWERED` while no router knows."""

    def __init__(self, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(5), trust_env=True)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    async def wanted(self, router: str, hardware_class: str, *, starts: bool = True) -> tuple[int, str]:
        """The devices that a class should have, and why. `starts` declares that they are started on demand."""
        method, verb = ("POST", "/starts") if starts else ("GET", "")
        target = await self._ask(method, f"{router}/v1/scaling/{hardware_class}{verb}")
        return target["replicas"], target["reason"]

    async def endings(self, router: str) -> Mapping[str, PodLoss]:
        """What would be lost with each pod, by the pod's name."""
        return {one["worker"].rpartition("@")[2]: _ending(one) for one in await self.devices(router)}

    async def devices(self, router: str) -> Sequence[Mapping[str, Any]]:
        """The fleet's devices, as workers report them."""
        found: Sequence[Mapping[str, Any]] = (await self._ask("GET", f"{router}/v2/fleet"))["devices"]
        return found

    async def waits(self, router: str, hardware_class: str) -> bool:
        """Whether jobs wait for a class; False for a class that the routers do not know."""
        found = (await self._ask("GET", f"{router}/v2/fleet")).get("classes", {}).get(hardware_class, {})
        return any((*found.get("depth", ()), *found.get("held", ())))

    async def _ask(self, method: str, url: str) -> Mapping[str, Any]:
        async with self._http.request(method, url) as answer:
            answer.raise_for_status()
            found: Mapping[str, Any] = json.loads(await answer.read())
            return found


def _ending(device: Mapping[str, Any]) -> PodLoss:
    return PodLoss(
        running=device.get("running", 0),
        warm=len(device.get("warm", ())),
        held=device.get("held", 0),
        draining=device.get("draining", False),
    )

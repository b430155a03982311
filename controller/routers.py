"""What routers report to the operator: how many devices a class should have, and what its devices hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
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

    async def wanted(self, router: str, hardware_class: str) -> tuple[int, str]:
        """The devices that a class should have, and why; it declares that they are started on demand."""
        target = await self._ask("POST", f"{router}/v1/scaling/{hardware_class}/starts")
        return target["replicas"], target["reason"]

    async def endings(self, router: str) -> Mapping[str, PodLoss]:
        """What would be lost with each pod, by the pod's name."""
        devices = (await self._ask("GET", f"{router}/v2/fleet"))["devices"]
        return {one["worker"].rpartition("@")[2]: _ending(one) for one in devices}

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

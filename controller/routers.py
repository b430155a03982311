"""What routers report to the operator: how many devices a class should have, and what its devices hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from controller.decide.pools import Ending


class Routers:
    """The routers' HTTP door. Methods raise `httpx.HTTPError` while no router knows."""

    def __init__(self, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(headers=headers, timeout=5)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def wanted(self, router: str, hardware_class: str, *, starts: bool = True) -> tuple[int, str]:
        """The devices that a class should have, and why. `starts` declares that they are started on demand."""
        method, verb = ("POST", "/starts") if starts else ("GET", "")
        answer = await self._http.request(method, f"{router}/v1/scaling/{hardware_class}{verb}")
        answer.raise_for_status()
        target = answer.json()
        return target["replicas"], target["reason"]

    async def endings(self, router: str) -> Mapping[str, Ending]:
        """What would be lost with each pod, by the pod's name."""
        return {one["worker"].rpartition("@")[2]: _ending(one) for one in await self.devices(router)}

    async def devices(self, router: str) -> Sequence[Mapping[str, Any]]:
        """The fleet's devices, as workers report them."""
        found: Sequence[Mapping[str, Any]] = (await self._fleet(router))["devices"]
        return found

    async def waits(self, router: str, hardware_class: str) -> bool:
        """Whether jobs wait for a class; False for a class that the routers do not know."""
        found = (await self._fleet(router)).get("classes", {}).get(hardware_class, {})
        return any((*found.get("depth", ()), *found.get("held", ())))

    async def _fleet(self, router: str) -> Mapping[str, Any]:
        answer = await self._http.get(f"{router}/v2/fleet")
        answer.raise_for_status()
        found: Mapping[str, Any] = answer.json()
        return found


def _ending(device: Mapping[str, Any]) -> Ending:
    return Ending(
        running=device.get("running", 0),
        warm=len(device.get("warm", ())),
        held=device.get("held", 0),
        draining=device.get("draining", False),
    )

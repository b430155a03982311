"""What routers tell the operator: how many devices a class should have, and what its devices hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from controller.decide.endings import Ending


class Routers:
    """The routers' HTTP door. Methods raise `httpx.HTTPError` while no router knows."""

    def __init__(self, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(headers=headers, timeout=5)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def wanted(self, router: str, hardware_class: str) -> tuple[int, str]:
        """The devices that a class should have, and why. It also says that somebody starts them."""
        answer = await self._http.post(f"{router}/v1/scaling/{hardware_class}/starts")
        answer.raise_for_status()
        said = answer.json()
        return said["replicas"], said["reason"]

    async def endings(self, router: str) -> Mapping[str, Ending]:
        """What would be lost with each pod, by its name."""
        answer = await self._http.get(f"{router}/v2/fleet")
        answer.raise_for_status()
        return {one["worker"].rpartition("@")[2]: _ending(one) for one in answer.json()["devices"]}


def _ending(device: Mapping[str, Any]) -> Ending:
    return Ending(
        running=device.get("running", 0),
        warm=len(device.get("warm", ())),
        held=device.get("held", 0),
        draining=device.get("draining", False),
    )

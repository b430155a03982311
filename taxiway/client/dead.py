"""What an operator does with the messages that the fleet gave up; at the HTTP door."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from taxiway.client.door import Door


class DeadLetters:
    """The fleet's dead letters. Each call raises `UnknownLetterError` for a letter that is not kept."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def list(self, most: int) -> list[dict[str, Any]]:
        """The last letters, the latest first: id, why, when and by whom, the job, and who held that and ended."""
        letters: list[dict[str, Any]] = (await self._door.administer("GET", f"/v2/dead?most={most}"))["letters"]
        return letters

    async def show(self, letter: str) -> dict[str, Any]:
        """One letter with its message."""
        return await self._door.administer("GET", _path(letter))

    async def replay(self, letter: str) -> str:
        """Let the letter's job begin anew; its id, which it had before."""
        return str((await self._door.administer("POST", f"{_path(letter)}/replay"))["job"])

    async def drop(self, letter: str) -> None:
        """Forget a letter."""
        await self._door.administer("DELETE", _path(letter))


def _path(letter: str) -> str:
    return f"/v2/dead/{quote(letter, safe='')}"

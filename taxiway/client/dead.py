"""Operations on dead letters, through the HTTP door."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from taxiway.client.door import Door


class DeadLetters:
    """The fleet's dead letters. A call raises `UnknownLetterError` for an unknown letter id."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def list(self, most: int) -> list[dict[str, Any]]:
        """Letters, most recent first: id, reason, time, reporter, job, and the workers that died holding it."""
        letters: list[dict[str, Any]] = (await self._door.administer("GET", f"/v2/dead?most={most}"))["letters"]
        return letters

    async def show(self, letter: str) -> dict[str, Any]:
        """One letter with its message."""
        return await self._door.administer("GET", _path(letter))

    async def replay(self, letter: str) -> str:
        """Run the letter's job again from the beginning. Returns the job's id, which does not change."""
        return str((await self._door.administer("POST", f"{_path(letter)}/replay"))["job"])

    async def drop(self, letter: str) -> None:
        """Forget a letter."""
        await self._door.administer("DELETE", _path(letter))


def _path(letter: str) -> str:
    return f"/v2/dead/{quote(letter, safe='')}"

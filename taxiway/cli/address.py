"""Which fleet a command speaks to, and in which form it answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from taxiway.cli.failure import UNAVAILABLE, CommandError
from taxiway.client.asyncio_client import AsyncClient

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

NO_FLEET = "`taxiway up --detach` starts a fleet here; --url or TAXIWAY_URL names another"


_PROCESSES = Path("/proc")


class _FleetFile(msgspec.Struct):
    """`fleet.json`, which a supervisor that is killed leaves behind."""

    http: str
    pid: int = 0
    processes: list[dict[str, Any]] = []

    @property
    def abandoned(self) -> bool:
        """Whether its supervisor has ended, and all that it had started with it."""
        return self.pid > 0 and _PROCESSES.is_dir() and not (_PROCESSES / str(self.pid)).exists()


def fleet_options(command: F) -> F:
    """Adds `--url`, `--data` and `--json` to a command."""
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(command)
    command = click.option(
        "--data", type=click.Path(path_type=Path), help="Data directory of a fleet here [TAXIWAY_DATA, else .taxiway]."
    )(command)
    return click.option("--url", help="The fleet's address, http:// or redis:// [TAXIWAY_URL, else the fleet here].")(
        command
    )


def find_fleet(url: str | None, data: Path | None, environment: Mapping[str, str]) -> str:
    """The address given, else that in the environment, else that of the fleet that runs here.

    Raises:
        CommandError: no fleet runs here.
    """
    given = url or environment.get("TAXIWAY_URL")
    if given:
        return given
    folder = _directory(data, environment)
    try:
        fleet = _read_fleet(folder)
    except (OSError, msgspec.MsgspecError) as error:
        raise CommandError(f"no fleet runs from {folder}", hint=NO_FLEET, code=UNAVAILABLE) from error
    if fleet.abandoned:
        why = f"its supervisor, process {fleet.pid}, has ended"
        raise CommandError(f"no fleet runs from {folder}: {why}", hint=NO_FLEET, code=UNAVAILABLE)
    return fleet.http


def processes_here(url: str | None, data: Path | None, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """The processes of the fleet that runs here, as its supervisor sees them; none where an address is given."""
    if url or environment.get("TAXIWAY_URL"):
        return []
    try:
        return _read_fleet(_directory(data, environment)).processes
    except (OSError, msgspec.MsgspecError):
        return []


def _directory(data: Path | None, environment: Mapping[str, str]) -> Path:
    return data or Path(environment.get("TAXIWAY_DATA") or ".taxiway")


def _read_fleet(folder: Path) -> _FleetFile:
    return msgspec.json.decode((folder / "fleet.json").read_bytes(), type=_FleetFile)


def key_for(address: str, environment: Mapping[str, str]) -> str | None:
    """The key in `TAXIWAY_KEY` for a router, and for a broker the first in `TAXIWAY_PRODUCER_SECRET`.

    No option has one, for all on a machine see each command's options.
    """
    variable = "TAXIWAY_KEY" if address.startswith("http") else "TAXIWAY_PRODUCER_SECRET"
    return environment.get(variable, "").partition(",")[0] or None


def ask(url: str | None, data: Path | None, question: Callable[[AsyncClient], Awaitable[T]]) -> T:
    """The answer of the fleet that the options name. Raises `TaxiwayError`, and `CommandError` where there is none."""

    async def asked() -> T:
        address = find_fleet(url, data, os.environ)
        async with AsyncClient(address, key=key_for(address, os.environ)) as client:
            return await question(client)

    return asyncio.run(asked())


def print_json(value: Any) -> None:
    """Print one JSON value on stdout."""
    click.echo(msgspec.json.encode(value).decode())

"""Which fleet a command talks to, and its output format."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from taxiway.cli import UNAVAILABLE, CommandError
from taxiway.client.asyncio_client import AsyncClient

T = TypeVar("T")

NO_FLEET = "start a fleet with `taxiway up --detach`, or name one with --url or TAXIWAY_URL"

_PROCESSES = Path("/proc")


class _FleetFile(msgspec.Struct):
    """`fleet.json`, which remains after a supervisor was killed."""

    http: str
    broker: str = ""
    pid: int = 0
    processes: list[dict[str, Any]] = []


@dataclass(frozen=True, slots=True)
class AskedFleet:
    """The fleet that a command asks, and the form in which it prints answers."""

    url: str | None
    data: Path | None
    as_json: bool

    def ask(self, question: Callable[[AsyncClient], Awaitable[T]]) -> T:
        """The answer. Raises `TaxiwayError`, or `CommandError` if there is no fleet."""

        async def run() -> T:
            address = find_fleet(self.url, self.data, os.environ)
            async with AsyncClient(address, key=key_for(address, os.environ)) as client:
                return await question(client)

        return asyncio.run(run())

    def present(self, value: Any, show: str) -> None:
        """Print a value as JSON, or for people, by that function of `taxiway.cli.show`, imported only for them."""
        if self.as_json:
            print_json(value)
        else:
            getattr(importlib.import_module("taxiway.cli.show"), show)(value)

    def echo(self, value: Any, text: object) -> None:
        """Print a value as JSON, or the text for people."""
        print_json(value) if self.as_json else click.echo(text)


def fleet_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds `--url`, `--data` and `--json` to a command, which gets them as its `fleet`."""

    @click.option("--url", help="The fleet's address, http:// or redis:// [TAXIWAY_URL, else the local fleet].")
    @click.option(
        "--data", type=click.Path(path_type=Path), help="Data directory of a local fleet [TAXIWAY_DATA, else .taxiway]."
    )
    @click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
    @wraps(command)
    def with_fleet(*, url: str | None, data: Path | None, as_json: bool, **options: Any) -> None:
        command(fleet=AskedFleet(url, data, as_json), **options)

    return with_fleet


def find_fleet(url: str | None, data: Path | None, environment: Mapping[str, str]) -> str:
    """The address given, else from the environment, else that of the local fleet.

    Raises:
        CommandError: no local fleet is running.
    """
    return url or environment.get("TAXIWAY_URL") or _local_fleet(data, environment).http


def find_store(url: str | None, data: Path | None, environment: Mapping[str, str]) -> str:
    """The state store's address: as given, else from the environment, else that of the local fleet.

    Raises:
        CommandError: no local fleet is running.
    """
    return url or environment.get("TAXIWAY_BROKER") or _local_fleet(data, environment).broker


def _local_fleet(data: Path | None, environment: Mapping[str, str]) -> _FleetFile:
    folder = _directory(data, environment)
    try:
        fleet = _read_fleet(folder)
    except (OSError, msgspec.MsgspecError) as error:
        raise CommandError(f"no fleet runs from {folder}", hint=NO_FLEET, code=UNAVAILABLE) from error
    if fleet.pid > 0 and _PROCESSES.is_dir() and not (_PROCESSES / str(fleet.pid)).exists():
        why = f"its supervisor, process {fleet.pid}, has ended"
        raise CommandError(f"no fleet runs from {folder}: {why}", hint=NO_FLEET, code=UNAVAILABLE)
    return fleet


def processes_here(url: str | None, data: Path | None, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """The local fleet's processes, as its supervisor sees them; none if an address is given."""
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
    """`TAXIWAY_KEY` for a router; for a broker, the first key in `TAXIWAY_PRODUCER_SECRET`.

    There is no option for it: every user of a machine can see a command's options.
    """
    variable = "TAXIWAY_KEY" if address.startswith("http") else "TAXIWAY_PRODUCER_SECRET"
    return environment.get(variable, "").partition(",")[0] or None


def print_json(value: Any) -> None:
    """Print one JSON value on stdout, in UTF-8 whatever the locale."""
    click.echo(msgspec.json.encode(value))

"""`up`, `down`, `doctor`: the fleet's own packages do the work, in the process that this one becomes."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import click

from taxiway.cli.failure import MISSING, CommandError

_NEEDED = ("celery", "kombu", "yaml", "litestar", "psutil")
"""Packages whose absence shows that a checkout was not set up."""

_SHOWN_AS = "_TAXIWAY_SHOWN_AS"  # how a usage line names the command that this process became

_data = click.option("--data", metavar="DIR", help="Data directory [TAXIWAY_DATA, else .taxiway].")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


@click.command()
@_data
@_json
@click.option("--detach", is_flag=True, help="Return once everything is ready; `taxiway down` stops it.")
@click.option("--emulate", multiple=True, metavar="CLASS", help="Serve this class on the CPU, marked as emulated.")
@click.option("--workers", multiple=True, metavar="CLASS=N", help="Worker processes of a class.")
@click.option("--autoscale", is_flag=True, help="Run as many workers as there is work for, within the cores.")
@click.option("--flower/--no-flower", default=True, help="Whether to start Flower.")
@click.option("--flower-port", metavar="PORT", help="Flower's port [5555, or a free one].")
@click.option("--port", metavar="PORT", help="The router's HTTP port [8080, or a free one].")
@click.option("--fetch/--no-fetch", default=True, help="Whether to fetch missing weights first.")
def up(
    data: str | None,
    *,
    as_json: bool,
    detach: bool,
    emulate: Sequence[str],
    workers: Sequence[str],
    autoscale: bool,
    flower: bool,
    flower_port: str | None,
    port: str | None,
    fetch: bool,
) -> None:
    """Start the broker, a router, workers and Flower on this machine, and keep them up."""
    flags = {"--detach": detach, "--autoscale": autoscale, "--no-flower": not flower, "--no-fetch": not fetch}
    arguments = [flag for flag, wanted in flags.items() if wanted]
    arguments += [*pairs("--emulate", emulate), *pairs("--workers", workers)]
    arguments += [*_option("--flower-port", flower_port), *_option("--port", port)]
    become("local", ["up", *arguments, *_common(data, as_json=as_json)], verb="up")


@click.command()
@_data
@_json
def down(data: str | None, *, as_json: bool) -> None:
    """Stop the fleet that runs here."""
    become("local", ["down", *_common(data, as_json=as_json)], verb="down")


@click.command()
@_data
@_json
def doctor(data: str | None, *, as_json: bool) -> None:
    """Say what this machine has, what is missing and how to get it, and how the fleet that runs here fares."""
    become("local", ["doctor", *_common(data, as_json=as_json)], verb="doctor")


def find_tree(places: Iterable[Path]) -> Path:
    """The first of `places` that is a checkout of taxiway.

    Raises:
        CommandError: none is.
    """
    for place in places:
        if (place / "local" / "__main__.py").is_file() and (place / "queues.yaml").is_file():
            return place.resolve()
    raise CommandError(
        "only taxiway's client is installed here: the fleet (router, workers, models) runs from a checkout",
        hint="clone taxiway's repository, run `make setup` there, then `.venv/bin/taxiway up` in it",
        code=MISSING,
    )


def become(module: str, arguments: Sequence[str], *, verb: str) -> NoReturn:
    """Replace this process by the fleet's own command `python -m module`: signals and exit codes are its own.

    Raises:
        CommandError: the fleet's code or packages are not here.
    """
    tree = find_tree([Path(__file__).parents[2], Path.cwd()])
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"the fleet's packages are not installed for {sys.executable}: {', '.join(missing)}",
            hint=f"run `make setup` in {tree}, then `{tree}/.venv/bin/taxiway {verb}`",
            code=MISSING,
        )
    path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
    shown = "taxiway" if arguments[:1] == [verb] else f"taxiway {verb}"
    command = [sys.executable, "-P", "-m", module, *arguments]  # -P: no `tasks` of the current folder
    sys.stdout.flush()
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path, _SHOWN_AS: shown})


def shown_as(otherwise: str) -> str:
    """How usage lines name this process's command: as the user called it by `become`, or `otherwise`."""
    return os.environ.pop(_SHOWN_AS, otherwise)


def pairs(option: str, values: Iterable[str]) -> list[str]:
    """The option once for each value, as a command line has it."""
    return [text for value in values for text in (option, value)]


def _option(option: str, value: str | None) -> list[str]:
    return pairs(option, [value] if value else [])


def _common(data: str | None, *, as_json: bool) -> list[str]:
    return [*_option("--data", data), *(["--json"] if as_json else [])]

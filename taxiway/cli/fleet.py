"""The verbs whose work the fleet's own packages do, in the process that this one becomes."""

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

_KEYS = """\b
new --tenant NAME --scope submit|read|admin … [--expires DAYS]
                 make a key, and print it this once
list [--json]    every key that is known, but for itself
revoke ID        forget a key: routers refuse it within a second
--file FILE      the keys file [TAXIWAY_KEYS]

docs/security.md tells what each scope may do."""

_SIMULATE = """\b
--trace TRACE    a CSV file, or poisson:rate=50,duration=600,seed=1
--fleet FILE     a fleet file, such as simulator/fleets/azure-mixed.yaml
--policy NAME    one policy [taxiway]; --compare runs them all
--load X         times the requests
--seed N         decides all chance
--json           one JSON object a policy
--plot FILE      a chart, one HTML file

docs/simulator.md tells what is modelled."""

_PLAN = """\b
--trace TRACE         a CSV file, or poisson:rate=50,duration=600,seed=1
--rate MODEL=R        instead: R requests a second of a model; may be repeated
--slo SERVICE=SHARE   share to answer in time, such as live=0.95; may be repeated
--prices FILE         a price file: instance, accelerator, accelerator_count, usd_per_hour, usd_per_hour_spot
--fleet FILE          a fleet file [simulator/fleets/azure-plan.yaml]
--seed N              decides all chance
--json                one JSON object

docs/planner.md tells how the mix is found."""

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


@click.command()
@click.option(
    "--models", metavar="DIR", help="Folder of models' folders [TAXIWAY_MODELS, else the checkout's models/]."
)
@click.option("--queues", metavar="FILE", help="[TAXIWAY_QUEUES, else the checkout's queues.yaml].")
@click.option("--run", "running", is_flag=True, help="Run an example of each variant too; weights are fetched.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def check(models: str | None, queues: str | None, *, running: bool, as_json: bool) -> None:
    """Check queues.yaml, the models, and their files that are on this machine, before a fleet runs by them.

    Exits with 1 where anything is wrong. `taxiway up` does the same first, without --run.
    """
    flags = [flag for flag, wanted in {"--run": running, "--json": as_json}.items() if wanted]
    files = [*pairs("--models", [models] if models else []), *pairs("--queues", [queues] if queues else [])]
    become("workers.check", [*flags, *files], verb="check")


@click.command(context_settings={"ignore_unknown_options": True}, options_metavar="", epilog=_KEYS)
@click.argument("arguments", metavar="new|list|revoke [...]", nargs=-1, type=click.UNPROCESSED)
def keys(arguments: tuple[str, ...]) -> None:
    """Make, list and revoke keys of the HTTP door."""
    become("router.access", list(arguments), verb="keys")


@click.command()
@click.option("--model", "models", multiple=True, metavar="NAME", help="Model to measure; may be repeated [all].")
@click.option("--variant", "variants", multiple=True, metavar="NAME", help="Variant to measure; may be repeated [all].")
@click.option("--device", default="cpu:0", metavar="DEVICE", help="cpu:0, cuda:0 or tpu:0.", show_default=True)
@click.option("--quick", is_flag=True, help="About 12 seconds a variant instead of 60.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--output", metavar="DIR", help="Folder of models' folders to write to [the checkout's models/].")
def profile(
    models: Sequence[str],
    variants: Sequence[str],
    device: str,
    *,
    quick: bool,
    as_json: bool,
    output: str | None,
) -> None:
    """Measure how models run on this machine: load time, memory, and latency over batch and size.

    Writes DIR/<model>/profiles/<device>.yaml, which placement reads. Let nothing else run meanwhile.
    """
    flags = {"--quick": quick, "--json": as_json}
    arguments = [flag for flag, wanted in flags.items() if wanted]
    arguments += [*pairs("--model", models), *pairs("--variant", variants), "--device", device]
    become("workers.profiling", [*arguments, *pairs("--output", [output] if output else [])], verb="profile")


@click.command(context_settings={"ignore_unknown_options": True}, options_metavar="", epilog=_SIMULATE)
@click.argument("arguments", metavar="--trace TRACE --fleet FILE [...]", nargs=-1, type=click.UNPROCESSED)
def simulate(arguments: tuple[str, ...]) -> None:
    """Replay a trace on a modelled fleet, under taxiway's placement and under others."""
    become("simulator", ["simulate", *arguments], verb="simulate")


@click.command(context_settings={"ignore_unknown_options": True}, options_metavar="", epilog=_PLAN)
@click.argument(
    "arguments", metavar="--trace TRACE --slo SERVICE=SHARE --prices FILE [...]", nargs=-1, type=click.UNPROCESSED
)
def plan(arguments: tuple[str, ...]) -> None:
    """Find the cheapest instances that serve a load in time, and check them by a simulation."""
    become("simulator", ["plan", *arguments], verb="plan")


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

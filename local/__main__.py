"""The command line of a local fleet. Data goes to stdout, progress and hints to stderr."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

from local.demo import DEMO_COUNTS, answer_all, artefacts_of_examples, asks, demo_fleet, plain
from local.doctor import ServerAwayError, check_servers, examine
from local.embedded import EmbeddedValkeyError
from local.fetch import fetch, for_runtimes, runtimes_of
from local.plan import Bounds, Plan, PlanError, PortTakenError, absent, check_ports, most_workers, plan_fleet
from local.show import SCREEN, console_of, show_answers, show_findings, show_fleet, show_rows
from local.state import AlreadyRunningError, Fleet, data_directory, read_fleet, stop_fleet, supervisor_pid
from local.supervisor import StartError, in_tree, own_command
from local.up import Options, run_fleet
from tasks.check import QUEUES, check_configuration
from tasks.document import DocumentError
from tasks.logs import log_to_stderr
from tasks.machine import look
from tasks.models.artefacts import ArtefactError
from tasks.models.catalogue import Catalogue, load_catalogue
from tasks.settings import SettingsError, cache_directory, models_folder, queues_file
from tasks.topology import Topology, load_topology
from taxiway.cli import MISSING, UNAVAILABLE, USAGE, CommandError, report
from taxiway.cli.fleet import shown_as
from taxiway.errors import ModelUnavailableError, UnknownModelError

_EXPECTED: dict[type[Exception], tuple[int, str]] = {
    AlreadyRunningError: (USAGE, "`taxiway down` stops it; --data names another directory"),
    ArtefactError: (MISSING, ""),
    DocumentError: (USAGE, ""),
    EmbeddedValkeyError: (MISSING, ""),
    ModelUnavailableError: (USAGE, "`taxiway check` says what is wrong with each model"),
    PlanError: (USAGE, "`taxiway doctor` shows what this machine has; --emulate CLASS serves a class on the CPU"),
    PortTakenError: (MISSING, "name another port; without the option a free one is used"),
    ServerAwayError: (UNAVAILABLE, "start the server, or unset the variable; `taxiway doctor` tells more"),
    SettingsError: (USAGE, ""),
    StartError: (MISSING, ""),
    UnknownModelError: (USAGE, "`taxiway models` lists what a fleet can run"),
}
"""The exit code and the hint for each error that a user can fix."""

_ERROR = re.compile(r"^error: (.*)", re.MULTILINE | re.DOTALL)  # how a supervisor that ends says why

_data = click.option("--data", type=click.Path(path_type=Path), help="Data directory [TAXIWAY_DATA, else .taxiway].")
_PORT = click.IntRange(0, 65535)
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


class _Count(click.ParamType[tuple[str, int]]):
    """`CLASS=N`, N workers of a hardware class."""

    name = "CLASS=N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        name, _, count = str(value).partition("=")
        if not name or not count.isdecimal():
            self.fail(f"expected CLASS=N, such as cpu.batch=2, got {value!r}", param, ctx)
        return name, int(count)


@click.group()
def main() -> None:
    """Run a whole fleet on this machine."""


@main.command()
@_data
@_json
@click.option("--detach", is_flag=True, help="Return once everything is ready; `down` stops it.")
@click.option("--emulate", multiple=True, metavar="CLASS", help="Serve this class on the CPU, marked as emulated.")
@click.option("--workers", "counts", type=_Count(), multiple=True, help="Worker processes of a class.")
@click.option("--autoscale", is_flag=True, help="Run as many workers as there is work for, within the cores.")
@click.option("--flower/--no-flower", default=True, help="Whether to start Flower.")
@click.option("--flower-port", type=_PORT, default=0, help="Flower's port [5555, or a free one].")
@click.option("--port", type=_PORT, default=0, help="The router's HTTP port [8080, or a free one].")
@click.option("--fetch/--no-fetch", "fetching", default=True, help="Whether to fetch missing weights first.")
def up(
    data: Path | None,
    *,
    as_json: bool,
    detach: bool,
    emulate: Sequence[str],
    counts: Sequence[tuple[str, int]],
    autoscale: bool,
    flower: bool,
    flower_port: int,
    port: int,
    fetching: bool,
) -> None:
    """Start the broker, a router, workers and Flower, and keep them running."""
    if flower_port and not flower:
        raise click.UsageError("expected --flower-port or --no-flower, not both")
    options = Options(data=data_directory(data, os.environ), port=port, flower=flower, flower_port=flower_port)
    running = supervisor_pid(options.data)
    if running is not None:
        raise AlreadyRunningError(options.data, running)
    check_ports({"--port": port, "--flower-port": flower_port})
    check_servers(os.environ)
    topology, machine = _topology(), look()
    _check()
    most = most_workers(topology, machine, emulate=emulate, counts=dict(counts)) if autoscale else dict(counts)
    plan = plan_fleet(topology, machine, emulate=emulate, counts=most)
    if fetching:
        _fetch_for(plan, topology)
    if detach:
        with Console(stderr=True).status("starting the broker, a router, workers and Flower"):
            fleet = _detached(sys.argv[1:], options.data)
        _announce(as_json)(fleet)
        return
    log_to_stderr()
    least = {name: hardware.scaling.minimum for name, hardware in topology.hardware.items()}
    run_fleet(plan, options, os.environ, _announce(as_json), Bounds(least, machine.cores) if autoscale else None)


@main.command()
@_data
@_json
def down(data: Path | None, *, as_json: bool) -> None:
    """Stop the fleet after its workers have finished the jobs they hold; a second call stops it at once.

    It is not an error if no fleet is running.
    """
    folder = data_directory(data, os.environ)
    with Console(stderr=True).status("workers finish what they run; Ctrl-C, or `taxiway down` again, ends them now"):
        stopped = stop_fleet(folder)
    text = "stopped" if stopped else "no fleet runs from this directory"
    click.echo(_text({"stopped": stopped, "data": str(folder)}) if as_json else f"{folder}: {text}")


@main.command()
@_data
@_json
def doctor(data: Path | None, *, as_json: bool) -> None:
    """Report what this machine has, what is missing, how to install it, and the state of the local fleet."""
    findings = examine(look(), os.environ, read_fleet(data_directory(data, os.environ)))
    if as_json:
        click.echo(_text({"findings": findings}))
    else:
        show_findings(findings, Console())


@main.command("fetch")
@click.argument("models", nargs=-1)
def fetch_command(models: Sequence[str]) -> None:
    """Fetch the weights of MODELS (all of them when none is named) into the cache."""
    catalogue = _catalogue()
    chosen = [catalogue.resolve(name) for name in models] or list(catalogue.models.values())
    failed = fetch(for_runtimes(chosen, look().runtimes), cache_directory(os.environ), Console(stderr=True))
    for error in failed:
        report(str(error), "")
    if failed:
        sys.exit(MISSING)


@main.command("demo")
@_json
@click.option("--rows", is_flag=True, help="Show every input, not only a summary and some examples.")
def demo_command(*, as_json: bool, rows: bool) -> None:
    """Start a fleet, run real models on real inputs on every hardware class, and stop it."""
    console = Console(stderr=True)
    topology, machine, catalogue = _topology(), look(), _catalogue()
    emulated = absent(topology, machine)
    cache = cache_directory(os.environ)
    _fetch_for(plan_fleet(topology, machine, emulate=emulated, counts=DEMO_COUNTS), topology)
    for error in fetch(artefacts_of_examples(catalogue), cache, console):
        raise error
    with demo_fleet(emulated, console) as fleet:
        answers = asyncio.run(answer_all(fleet.broker, asks(catalogue, cache), console))
    if as_json:
        click.echo(_text({"answers": list(map(plain, answers)), "supervisor": fleet.pid}))
    else:
        if rows:
            show_rows(answers)
        show_answers(answers, machine, console_of(SCREEN))
    if any(answer.result is None for answer in answers):
        sys.exit(1)


def _topology() -> Topology:
    return load_topology(queues_file(os.environ))


def _catalogue() -> Catalogue:
    return load_catalogue(models_folder(os.environ))


def _check() -> None:
    """Report problems of the configuration; an invalid model only disables itself.

    Raises:
        CommandError: queues.yaml is invalid.
    """
    found = check_configuration(queues_file(os.environ), models_folder(os.environ), cache_directory(os.environ))
    for verdict in found:
        if verdict.level == "error" and verdict.subject == QUEUES:
            raise CommandError(f"{QUEUES}: {verdict.text}", hint=verdict.hint, code=USAGE)
        if verdict.level != "ok":
            click.echo(f"warning: {verdict.subject}: {verdict.text}", err=True)


def _fetch_for(plan: Plan, topology: Topology) -> None:
    """Fetch weights before anything starts: otherwise a worker's first callers wait for the download."""
    catalogue = _catalogue()
    runtimes = runtimes_of(topology, {worker.hardware_class for worker in plan.workers}, look().runtimes)
    wanted = for_runtimes(catalogue.models.values(), runtimes)
    for error in fetch(wanted, cache_directory(os.environ), Console(stderr=True)):
        report(str(error), "the fleet starts without it: its variants are tried again when they are asked for")


def _detached(arguments: Sequence[str], data: Path) -> Fleet:
    """Start the same command again as a process of its own, and wait until it says that all is ready.

    Raises:
        StartError: it ended before that.
    """
    told = [argument for argument in arguments if argument not in ("--detach", "--json")]
    (data / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
    log = data / "logs" / "supervisor.log"
    with log.open("ab") as errors:
        start = log.stat().st_size
        supervisor = subprocess.Popen(
            own_command(*told, "--json", "--no-fetch"),
            env=in_tree(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    assert supervisor.stdout is not None
    with supervisor.stdout as said:
        line = said.readline()
    if not line:
        why = log.read_bytes()[start:].decode(errors="replace").strip()
        said_so = _ERROR.search(why)
        raise StartError((said_so[1] if said_so else why) or f"the supervisor ended at once; see {log}")
    return msgspec.json.decode(line, type=Fleet)


def _announce(as_json: bool) -> Callable[[Fleet], None]:
    def announce(fleet: Fleet) -> None:
        if as_json:
            click.echo(_text(fleet))
        else:
            show_fleet(fleet, Console())
        sys.stdout.flush()

    return announce


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


if __name__ == "__main__":
    try:
        main(prog_name=shown_as("python -m local"))
    except CommandError as error:
        report(str(error), error.hint)
        sys.exit(error.code)
    except tuple(_EXPECTED) as error:
        code, hint = next(found for kind, found in _EXPECTED.items() if isinstance(error, kind))
        report(str(error), hint)
        sys.exit(code)

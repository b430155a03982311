"""The command line of a local fleet. Data goes to stdout, as tables for people; progress and hints to stderr."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Column, Table

from local.artefacts import fetch, for_engines, for_runtimes, runtimes_of, without_engine
from local.autoscaler import WorkerBounds, most_workers
from local.doctor import Finding, ServerAwayError, check_servers, examine
from local.embedded import EmbeddedValkeyError
from local.fleet import AlreadyRunningError, LocalFleet, data_directory, read_fleet, stop_fleet, supervisor_pid
from local.plan import PortTakenError, StartPlan, StartPlanError, check_ports, plan_fleet
from local.sites import options_of, run_sites
from local.supervisor import StartError, ended_with, in_tree, own_command
from local.up import UpOptions, run_fleet
from tasks.check import QUEUES, check_configuration
from tasks.document import DocumentError
from tasks.machine import look
from tasks.models.artefacts import ArtefactError
from tasks.models.catalogue import Catalogue
from tasks.models.folder import load_catalogue
from tasks.queues.queues_file import PublishedQueues
from tasks.settings import Settings, SettingsError, cache_directory, models_folder, queues_file, settings_from
from tasks.telemetry import log_to_stderr
from tasks.topology import Topology, load_topology, parse_topology
from taxiway.cli import MISSING, UNAVAILABLE, USAGE, CommandError, report
from taxiway.cli.address import print_json
from taxiway.cli.fleet import run
from taxiway.cli.show import stdout_console
from taxiway.connection import ConnectionPool
from taxiway.contract import keys
from taxiway.errors import ModelUnavailableError, UnknownModelError, flaw
from taxiway.release import release


def joined(url: str, hardware_class: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker that serves the class of the fleet whose broker has this address.

    Raises:
        SettingsError: the address, or the fleet's key in `environment`, is missing or wrong.
        BrokerUnavailableError: the broker does not answer, or refuses the account.
        CommandError: no router of a fleet is there, it is of another release, or it has no such class.
    """
    settings = settings_from({**environment, "TAXIWAY_BROKER": url})
    published = _published(settings)
    if published.release != release():
        raise CommandError(
            f"the fleet runs taxiway {published.release}, this machine has {release()}",
            hint="use the checkout or image of the fleet's version",
            code=MISSING,
        )
    topology = parse_topology(published.text)
    if hardware_class not in topology.hardware:
        expected = f"expected one of {', '.join(sorted(topology.hardware))}, got {hardware_class!r}"
        raise CommandError(f"--class: {expected}", hint="", code=USAGE)
    content = published.text.encode()
    file = settings.cache / "joined" / f"{hashlib.sha256(content).hexdigest()[:16]}.yaml"
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.write_bytes(content)
    return settings.environment() | {"TAXIWAY_QUEUES": str(file), "TAXIWAY_JOINED": "1"}


def _published(settings: Settings) -> PublishedQueues:
    raw = ConnectionPool(settings.broker, server="broker").call("GET", keys.QUEUES)
    if raw is None:
        raise CommandError(
            "no router has published a queues.yaml at this broker",
            hint="start a router of the fleet; it publishes within seconds",
            code=UNAVAILABLE,
        )
    return msgspec.json.decode(raw, type=PublishedQueues)


_EXPECTED: dict[type[Exception], tuple[int, str]] = {
    AlreadyRunningError: (USAGE, "`taxiway down` stops it; --data names another directory"),
    ArtefactError: (MISSING, ""),
    DocumentError: (USAGE, "`taxiway check` shows all that is wrong; docs/reference.md explains every field"),
    EmbeddedValkeyError: (MISSING, ""),
    ModelUnavailableError: (USAGE, "`taxiway check` says what is wrong with each model"),
    StartPlanError: (USAGE, "`taxiway doctor` shows what this machine has; --emulate CLASS serves a class on the CPU"),
    PortTakenError: (MISSING, "name another port; without the option a free one is used"),
    ServerAwayError: (UNAVAILABLE, "start the server, or unset the variable; `taxiway doctor` has details"),
    SettingsError: (USAGE, ""),
    StartError: (MISSING, ""),
    UnknownModelError: (USAGE, "`taxiway models` lists what a fleet can run"),
}
"""The exit code and the hint for each error that a user can fix."""

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
@click.option("--detach", is_flag=True, help="Return once everything is ready; `taxiway down` stops it.")
@click.option("--emulate", multiple=True, metavar="CLASS", help="Serve this class on the CPU, marked as emulated.")
@click.option("--workers", "counts", type=_Count(), multiple=True, help="Worker processes of a class.")
@click.option("--autoscale", is_flag=True, help="Run as many workers as there is work for, within the cores.")
@click.option("--flower/--no-flower", default=True, help="Whether to start Flower.")
@click.option("--flower-port", type=_PORT, default=0, help="Flower's port [5555, or a free one].")
@click.option("--port", type=_PORT, default=0, help="The router's HTTP port [8080, or a free one].")
@click.option("--fetch/--no-fetch", "fetching", default=True, help="Whether to fetch missing weights first.")
@click.option(
    "--sites", metavar="FOLDERS", help="A fleet for each of these folders, separated by commas (docs/sites.md)."
)
@click.option(
    "--script", type=click.Path(path_type=Path, exists=True), help="What the lines between sites do, and when."
)
def up(
    data: Path | None,
    *,
    sites: str | None,
    script: Path | None,
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
    """Start the broker, a router, workers and Flower on this machine, and keep them running."""
    if sites is not None:
        if detach or autoscale or port or flower_port:
            raise click.UsageError("expected --sites without --detach, --autoscale, --port and --flower-port")
        made = partial(options_of, machine=look(), emulate=emulate, counts=dict(counts), fetching=fetching)
        folders = [Path(folder) for folder in sites.split(",")]
        run_sites(folders, script, data_directory(data, os.environ), made, partial(_announce_sites, as_json=as_json))
        return
    if flower_port and not flower:
        raise click.UsageError("expected --flower-port or --no-flower, not both")
    options = UpOptions(data=data_directory(data, os.environ), port=port, flower=flower, flower_port=flower_port)
    running = supervisor_pid(options.data)
    if running is not None:
        raise AlreadyRunningError(options.data, running)
    check_ports({"--port": port, "--flower-port": flower_port})
    check_servers(os.environ)
    topology, machine = _topology(), look()
    _check()

    def planned(topology: Topology) -> StartPlan:
        most = most_workers(topology, machine, emulate=emulate, counts=dict(counts)) if autoscale else dict(counts)
        lacking = without_engine(topology, os.environ)
        return plan_fleet(topology, machine, emulate=emulate, counts=most, without_engine=lacking)

    plan = plan_fleet(topology, machine, emulate=emulate, counts=dict(counts))
    if fetching:
        fetch_for(plan, topology)
    if detach:
        with Console(stderr=True).status("starting the broker, a router, workers and Flower"):
            fleet = _detached(sys.argv[1:], options.data)
        _announce(as_json)(fleet)
        return
    log_to_stderr()
    click.echo("starting the broker, a router, workers and Flower; Ctrl-C stops them", err=True)
    least = {name: hardware.scaling.minimum for name, hardware in topology.hardware.items()}
    run_fleet(
        planned, options, os.environ, _announce(as_json), WorkerBounds(least, machine.cores) if autoscale else None
    )


@main.command()
@_data
@_json
def down(data: Path | None, *, as_json: bool) -> None:
    """Stop the fleet after its workers have finished the jobs they hold; a second call stops it at once.

    It is not an error if no fleet is running.
    """
    folder = data_directory(data, os.environ)
    with Console(stderr=True).status("workers finish their jobs; Ctrl-C, or `taxiway down` again, stops them now"):
        stopped = stop_fleet(folder)
    if as_json:
        print_json({"stopped": stopped, "data": str(folder)})
    else:
        click.echo(f"{folder}: {'stopped' if stopped else 'no fleet runs from this directory'}")


@main.command()
@click.argument("url")
@click.option("--class", "hardware_class", required=True, help="Hardware class of the fleet to serve.")
@click.option("--device", default="", help="Device to drive: cpu:0, cuda:0, tpu:0 [the class's first].")
@click.option("--name", default="", help="Name among the fleet's workers [class, device and this machine's name].")
def join(url: str, hardware_class: str, device: str, name: str) -> None:
    """Serve a class of the fleet whose broker is at URL from this machine, until SIGTERM.

    URL has the class's account at the broker (python -m broker.accounts --join CLASS); rediss:// is TLS. TAXIWAY_SECRET
    has the fleet's key. The fleet's queues.yaml comes from the broker; models are those of this checkout or image.
    """
    environment = os.environ | joined(url, hardware_class, os.environ)
    options = [("--class", hardware_class), ("--device", device), ("--name", name)]
    command = [sys.executable, "-m", "workers", *(word for pair in options if pair[1] for word in pair)]
    os.execve(sys.executable, command, environment)


@main.command()
@_data
@_json
def doctor(data: Path | None, *, as_json: bool) -> None:
    """Report what this machine has, what is missing, how to install it, and the state of the local fleet."""
    findings = examine(look(), os.environ, read_fleet(data_directory(data, os.environ)))
    if as_json:
        print_json({"findings": findings})
    else:
        show_findings(findings, stdout_console())


@main.command("fetch")
@click.argument("models", nargs=-1)
def fetch_command(models: Sequence[str]) -> None:
    """Fetch the weights of MODELS (all of them when none is named) into the cache."""
    catalogue, topology = _catalogue(), _topology()
    chosen = [catalogue.resolve(name) for name in models] or list(catalogue.models.values())
    engines = [one for one in for_engines(topology, catalogue, topology.hardware) if one[0] in chosen]
    wanted = [*for_runtimes(chosen, look().runtimes), *engines]
    failed = fetch(wanted, cache_directory(os.environ), Console(stderr=True))
    for error in failed:
        report(str(error), "")
    if failed:
        sys.exit(MISSING)


def _topology() -> Topology:
    return load_topology(queues_file(os.environ))


def _catalogue() -> Catalogue:
    return load_catalogue(models_folder(os.environ))


def _check() -> None:
    """Report problems of the configuration; an invalid model only disables itself.

    Raises:
        CommandError: queues.yaml is invalid.
    """
    found = check_configuration(queues_file(os.environ), models_folder(os.environ), os.environ)
    for verdict in found:
        if verdict.level == "error" and verdict.subject == QUEUES:
            raise CommandError(f"{QUEUES}: {verdict.text}", hint=verdict.hint, code=USAGE)
        if verdict.level != "ok":
            click.echo(f"warning: {verdict.subject}: {verdict.text}", err=True)


def fetch_for(plan: StartPlan, topology: Topology) -> None:
    """Fetch weights before anything starts: otherwise a worker's first callers wait for the download."""
    catalogue = _catalogue()
    classes = {worker.hardware_class for worker in plan.workers}
    runtimes = runtimes_of(topology, classes, look().runtimes)
    wanted = [*for_runtimes(catalogue.models.values(), runtimes), *for_engines(topology, catalogue, classes)]
    for error in fetch(wanted, cache_directory(os.environ), Console(stderr=True)):
        report(str(error), "the fleet starts without it, and fetches it when a request needs it")


def _detached(arguments: Sequence[str], data: Path) -> LocalFleet:
    """Run the same command as a supervisor in a session of its own, and wait until its fleet is ready.

    Raises:
        CommandError: it ended before that.
    """
    passed = [argument for argument in arguments if argument not in ("--detach", "--json")]
    (data / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
    log = data / "logs" / "supervisor.log"
    with log.open("ab") as errors:
        start = log.stat().st_size
        supervisor = subprocess.Popen(
            own_command(*passed, "--json", "--no-fetch"),
            env=in_tree(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    assert supervisor.stdout is not None
    with supervisor.stdout as output:
        line = output.readline()
    if not line:
        status = supervisor.wait()
        why = log.read_bytes()[start:].decode(errors="replace")
        raise ended_with(why or f"the supervisor ended at once, and wrote nothing to {log}: is its disk full?", status)
    return msgspec.json.decode(line, type=LocalFleet)


def _announce(as_json: bool) -> Callable[[LocalFleet], None]:
    def announce(fleet: LocalFleet) -> None:
        if as_json:
            print_json(fleet)
        else:
            show_fleet(fleet, stdout_console())
        sys.stdout.flush()

    return announce


def _announce_sites(urls: Mapping[str, str], *, as_json: bool) -> None:
    if as_json:
        print_json(urls)
    else:
        click.echo("\n".join(f"{site:7} {url}" for site, url in urls.items()))
    sys.stdout.flush()


def show_fleet(fleet: LocalFleet, console: Console) -> None:
    """The addresses of a fleet's interfaces, and its workers with their devices."""
    interfaces = {
        "HTTP": fleet.http,
        "Flower": fleet.flower or "not started",
        "broker": fleet.broker,
        "data": fleet.data,
    }
    for name, address in interfaces.items():
        console.print(f"{name:7} {address}", soft_wrap=True, highlight=False)
    workers = Table("class", "device", "worker", "pid")
    for worker in fleet.workers:
        device = f"{worker.device} (emulated)" if worker.emulated else worker.device
        workers.add_row(worker.hardware_class, device, worker.worker, str(worker.pid))
    for name in sorted(fleet.scaled - {worker.hardware_class for worker in fleet.workers}):
        workers.add_row(name, "–", "starts when there is work for it", "–")
    for name, why in sorted(fleet.left_out.items()):
        workers.add_row(name, "–", f"not started: {why}", "–")
    console.print(workers)


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """A table of what the machine has, and how to get what it lacks."""
    table = Table("ok", *(Column(name, overflow="fold") for name in ("what", "found", "what to do")))
    for finding in findings:
        mark = "[green]✓[/]" if finding.found else "[yellow]–[/]"
        table.add_row(mark, finding.subject, finding.value, finding.remedy)
    console.print(table)


def exit_from(command: click.Command, name: str) -> None:
    """Run a command, and exit with the code and the hint of what a user can fix."""
    try:
        run(command, name)
    except CommandError as error:
        report(str(error), error.hint)
        sys.exit(error.code)
    except tuple(_EXPECTED) as error:
        code, hint = next(found for kind, found in _EXPECTED.items() if isinstance(error, kind))
        report(str(error), hint)
        sys.exit(code)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        why = ": ".join(filter(None, (error.filename, flaw(error))))
        report(why, "name folders that can be written, on a disk with space: --data, TAXIWAY_CACHE")
        sys.exit(MISSING)


if __name__ == "__main__":
    exit_from(main, "python -m local")

"""`python -m simulator`: `simulate` shows what policies attain and cost, `diff-config` what a configuration changes.

`plan` shows what to buy. They read queues.yaml, with what the fleet has learned.

Data to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from router.decide.snapshot import FleetSnapshot
from simulator.demand import InfeasibleError
from simulator.engine import OutcomeColumns, RunSummary, StuckError, played
from simulator.fleet import SERVICES, Fleet
from simulator.own_fleet import known as own_fleet
from simulator.own_fleet.difference import difference, difference_tables
from simulator.planner import plan as find_plan
from simulator.planner import tables
from simulator.policies.taxiway import POLICIES
from simulator.reports import figures, json_lines, usage
from simulator.traces import AzureRow, Trace, TraceError, TraceRow, columns_of, is_spec, synthetic_arrivals
from simulator.tuning.command import tune
from simulator.tuning.real_fleet import KnownFleet, urgency
from simulator.workload import Workload, prepare
from tasks.history import Arrivals
from tasks.history import joined as joined_arrivals
from tasks.settings import models_folder, queues_file
from tasks.topology import Topology, TopologyError, load_topology
from taxiway.cli import USAGE, CommandError, exit_on_error, report
from taxiway.cli.address import find_store
from taxiway.cli.fleet import run
from taxiway.cli.show import stdout_console

_HINTS: dict[type[Exception], str] = {
    TraceError: f"a trace is a CSV file with the header {columns_of(AzureRow)} or {columns_of(TraceRow)}, or a text "
    "such as poisson:rate=50,duration=600,seed=1",
    TopologyError: "docs/reference.md explains every field of queues.yaml; `taxiway check` examines it",
    own_fleet.StatusError: "`taxiway status --json > status.json` writes it",
    InfeasibleError: "ask for a smaller share or a longer deadline, or give the fleet more devices "
    "(`scaling.maximum`) or faster ones",
    StuckError: "this is an error of the simulator: report it, with the trace and the queues.yaml",
}


@click.group()
def main() -> None:
    """Simulate the fleet under load, without the fleet."""


@dataclass(frozen=True, slots=True)
class _Own:
    """Where a fleet's own files and facts are."""

    queues: Path | None
    url: str | None
    data: Path | None
    status: Path | None
    model: str

    def topology(self) -> Topology:
        """The file given, else the fleet's own. Raises `TopologyError`."""
        return load_topology(self.queues or queues_file(os.environ))

    def seen(self) -> FleetSnapshot | None:
        """The devices of the fleet; None if none was named and none runs here.

        Raises:
            BrokerUnavailableError: the state store that was named does not answer.
            StatusError: the file is no status.
        """
        if self.status is not None:
            return own_fleet.read_status(self.status)
        try:
            address = find_store(self.url, self.data, os.environ)
        except CommandError:
            if self.data is not None:
                raise
            click.echo(
                "note: no fleet runs here: times are those of the models' profiles, and each class has as many devices "
                "as its `scaling` allows",
                err=True,
            )
            return None
        return own_fleet.running_fleet(address)

    def known(self, topology: Topology, seen: FleetSnapshot | None, new: Collection[str] = ()) -> KnownFleet:
        """The fleet under a file; devices of the classes `new` may be started, of all if no devices are known."""
        startable = topology.hardware if seen is None else new
        return own_fleet.known_fleet(topology, models_folder(os.environ), seen or FleetSnapshot(), startable)

    def arrivals(self, source: str) -> Arrivals:
        """What arrived, by `--trace` or `--history`."""
        if is_spec(source) and not self.model:
            raise click.UsageError("a synthetic trace names no model: name one with --model")
        return own_fleet.arrivals_from(source, self.model, self.url, self.data)


_queues = click.option(
    "--queues",
    type=click.Path(path_type=Path),
    help="The fleet's file [TAXIWAY_QUEUES, else the checkout's queues.yaml].",
)


def _own_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--url", help="The fleet's state store, redis://… [TAXIWAY_BROKER, the local one]."),
        click.option("--data", type=click.Path(path_type=Path), help="Data directory of a local fleet [.taxiway]."),
        click.option(
            "--status", type=click.Path(path_type=Path), help="Output of `taxiway status --json`, in place of a fleet."
        ),
        click.option("--model", default="", help="The model of a trace that names none."),
    ):
        command = option(command)
    return command


@main.command(
    epilog="docs/simulator.md describes the model. "
    "Trials, other policies and lower bounds are in the laboratory: lab/README.md."
)
@click.option(
    "--trace", "source", required=True, help="A CSV file, a UTC day, or a text such as poisson:rate=50,duration=600."
)
@_queues
@_own_options
@click.option("--policy", "name", type=click.Choice(sorted(POLICIES)), default="taxiway", show_default=True)
@click.option("--compare", is_flag=True, help="Run every policy.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed.")
@click.option(
    "--load",
    type=click.FloatRange(0, 1000, min_open=True),
    default=1.0,
    show_default=True,
    help="Multiple of the trace's requests.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per policy.")
def simulate(source: str, name: str, compare: bool, seed: int, load: float, as_json: bool, **own: Any) -> None:
    """Replay a trace on the fleet of a queues.yaml, and print what policies attain and cost."""
    mine = _Own(**own)
    with _exit_on_error():
        topology = mine.topology()
        trace, fleet = _as_twin(mine.arrivals(source), mine.known(topology, mine.seen()))
        workload = prepare(trace.at_load(load, seed=seed), fleet)
        summaries = [_run(one, workload, seed) for one in (POLICIES if compare else [name])]
        if as_json:
            click.echo(json_lines(summaries), nl=False)
        else:
            _print(figures(summaries), "", usage(summaries))


def _as_twin(arrivals: Arrivals, known: KnownFleet) -> tuple[Trace, Fleet]:
    """What arrived, and the known fleet, in the simulator's words, which go to stderr."""
    topology = known.topology
    workload = own_fleet.replayable(own_fleet.under(arrivals, topology, topology), known).workload
    said = [f"{rank} stands for {', '.join(mine)}" for rank, mine in own_fleet.stands_for(topology)]
    click.echo(f"note: {'; '.join(said)}", err=True)
    return workload.trace, workload.fleet


@main.command(epilog="docs/simulator.md describes the figures.")
@click.argument("new_file", metavar="NEW/queues.yaml", type=click.Path(path_type=Path))
@click.option(
    "--old",
    "queues",
    type=click.Path(path_type=Path),
    help="The file to compare it with [TAXIWAY_QUEUES, else the checkout's queues.yaml].",
)
@click.option(
    "--history",
    "source",
    required=True,
    help="What arrived: a CSV file of `taxiway history export`, another trace, or a UTC day such as 2026-11-27.",
)
@_own_options
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: old, new and difference.")
def diff_config(new_file: Path, source: str, seed: int, as_json: bool, **own: Any) -> None:
    """Replay a history under another queues.yaml, and print what both attain and cost."""
    mine = _Own(**own)

    def play(workload: Workload, label: str) -> tuple[RunSummary, OutcomeColumns]:
        with _progress(label, len(workload)) as advance:
            policy = POLICIES["taxiway"](workload, seed)
            return played("taxiway", workload, policy, seed=seed, progress=advance)

    with _exit_on_error():
        old, new = mine.topology(), load_topology(new_file)
        arrivals, seen = mine.arrivals(source), mine.seen()
        added = new.hardware.keys() - old.hardware.keys()
        found = difference(arrivals, mine.known(old, seen), mine.known(new, seen, added), play)
        if as_json:
            click.echo(msgspec.json.encode(found))
        else:
            dollars, shares = difference_tables(found)
            _print(dollars, "", shares)


def _pairs(ctx: click.Context, option: click.Parameter, values: Sequence[str]) -> list[tuple[str, str]]:
    """`NAME=VALUE` options, in order."""
    found = [(name, value) for name, _, value in (text.partition("=") for text in values)]
    if wrong := [text for text, pair in zip(values, found, strict=True) if not all(pair)]:
        raise click.BadParameter(f"expected NAME=VALUE, got {wrong[0]!r}", ctx, option)
    return found


def _shares(ctx: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, float]:
    """`SERVICE=SHARE` options as a mapping."""
    found: dict[str, float] = {}
    for name, text in _pairs(ctx, option, values):
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if name in found or not 0 < share <= 1:
            expected = "each service once, with a share above 0, at most 1"
            raise click.BadParameter(f"expected {expected}, got {name}={text}", ctx, option)
        found[name] = share
    return found


@main.command(epilog="docs/planner.md describes the method.")
@click.option("--trace", "source", help="A CSV file, a UTC day, or a text such as poisson:rate=50,duration=600.")
@click.option(
    "--rate",
    "rates",
    multiple=True,
    metavar="MODEL=R",
    callback=_pairs,
    help="A model's requests per second, optionally with their service and sizes: chat=5,service=live,size=800.",
)
@click.option(
    "--slo",
    required=True,
    multiple=True,
    metavar="SERVICE=SHARE",
    callback=_shares,
    help="The share of a service's requests to answer in time.",
)
@_queues
@_own_options
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    source: str | None, rates: list[tuple[str, str]], slo: dict[str, float], seed: int, as_json: bool, **own: Any
) -> None:
    """Find the cheapest devices that serve a load in time, and check them by a simulation."""
    if bool(source) == bool(rates):
        raise click.UsageError("give either --trace or --rate")
    mine = _Own(**own)
    with _exit_on_error():
        topology = mine.topology()
        arrivals = mine.arrivals(source) if source else _arrivals_at(rates, seed)
        trace, fleet = _as_twin(arrivals, mine.known(topology, mine.seen(), topology.hardware))
        single = replace(fleet, penalties=(0.0,) * len(SERVICES))  # replays place each request by itself
        shares = _by_rank(slo, topology)
        found = find_plan(prepare(trace, single), shares, lambda what, on: _run("taxiway", on, seed, label=what))
    if as_json:
        click.echo(msgspec.json.encode({"slo": shares, "plan": found}))
    else:
        _print(*tables(shares, found))


def _by_rank(slo: dict[str, float], topology: Topology) -> dict[str, float]:
    """The shares by the simulator's services: of several that one stands for, the largest."""
    unknown = [name for name in slo if name not in topology.service]
    if unknown:
        raise click.UsageError(f"--slo: expected one of {', '.join(topology.service)}, got {unknown[0]}")
    found: dict[str, float] = {}
    for name, share in slo.items():
        rank = SERVICES[urgency(topology, name)]
        found[rank] = max(share, found.get(rank, 0.0))
    return found


def _arrivals_at(rates: Sequence[tuple[str, str]], seed: int) -> Arrivals:
    """Poisson arrivals of each `--rate`."""
    found = []
    for number, (model, text) in enumerate(rates):
        parts = text.split(",")
        services = [part.removeprefix("service=") for part in parts if part.startswith("service=")]
        rest = ",".join(part for part in parts if not part.startswith("service="))
        drawn = f"poisson:rate={rest},seed={seed + number}"
        found.append(synthetic_arrivals(drawn, model=model, service="".join(services)))
    return joined_arrivals(found)


def _print(*parts: Any) -> None:
    stdout_console().print(*parts, sep="\n")


def _run(name: str, workload: Workload, seed: int, *, label: str = "") -> RunSummary:
    with _progress(label or name, len(workload)) as advance:
        return played(name, workload, POLICIES[name](workload, seed), seed=seed, progress=advance)[0]


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[float], None]]:
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda arrived: bar.update(task, completed=arrived)


@contextmanager
def _exit_on_error() -> Iterator[None]:
    """As `exit_on_error`; exit code 2 for the caller's input."""
    try:
        with exit_on_error():
            yield
    except tuple(_HINTS) as error:
        report(str(error), next(text for kind, text in _HINTS.items() if isinstance(error, kind)))
        sys.exit(USAGE)


main.add_command(tune)

if __name__ == "__main__":
    run(main, "python -m simulator")

"""`python -m simulator simulate`: what policies attain and cost. Data to stdout, progress and errors to stderr."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simulator.bound import lower_bound
from simulator.chart import page
from simulator.engine import simulate as run_policy
from simulator.fleet import FleetError, load_fleet
from simulator.outcome import Summary
from simulator.policies.catalogue import POLICIES
from simulator.report import figures, json_lines, usage
from simulator.synthetic import is_spec, synthetic_trace
from simulator.traces import AZURE, GENERIC, TraceError, read_trace
from simulator.workload import Workload, prepare

_HINTS: dict[type[Exception], str] = {
    TraceError: f"a trace is a CSV file with the header {','.join(AZURE)} or {','.join(GENERIC)}, or a text such as "
    "poisson:rate=50,duration=600,seed=1",
    FleetError: "docs/simulator.md explains every field; simulator/fleets/azure-mixed.yaml is an example",
    OSError: "name a file in a folder that is there and can be written",
}


@click.group()
def main() -> None:
    """What the fleet would do under load, without the fleet."""


@main.command()
@click.option("--trace", "source", required=True, help="A CSV file, or a text such as poisson:rate=50,duration=600.")
@click.option("--fleet", "fleet_file", required=True, type=click.Path(path_type=Path), help="The fleet file (YAML).")
@click.option("--policy", "name", type=click.Choice(sorted(POLICIES)), default="taxiway", show_default=True)
@click.option("--compare", is_flag=True, help="Run every policy, and work out the lower bound on cost.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides all chance.")
@click.option(
    "--load", type=click.FloatRange(0, 1000, min_open=True), default=1.0, show_default=True, help="Times the requests."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a policy.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a chart to this HTML file.")
def simulate(
    source: str,
    fleet_file: Path,
    name: str,
    compare: bool,
    seed: int,
    load: float,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Replay a trace on a modelled fleet, and print what policies attain and cost."""
    with _told():
        workload = _workload(source, fleet_file, seed=seed, load=load)
        summaries = _compared(workload, seed) if compare else [_run(name, workload, seed)]
        if plot is not None:
            title = "What each policy attains and costs"
            subtitle = (
                f"{len(workload):,} requests of {Path(source).name} on {fleet_file.name}, load {load:g}, seed {seed}"
            )
            plot.write_text(page(summaries, title=title, subtitle=subtitle), encoding="utf-8")
    if as_json:
        click.echo(json_lines(summaries), nl=False)
    else:
        console = Console(width=shutil.get_terminal_size((160, 24)).columns)
        console.print(figures(summaries), "", usage(summaries))


def _workload(source: str, fleet_file: Path, *, seed: int, load: float) -> Workload:
    fleet = load_fleet(fleet_file)
    model = fleet.default_model
    trace = synthetic_trace(source, model=model) if is_spec(source) else read_trace(Path(source), model=model)
    return prepare(trace.at_load(load, seed=seed), fleet, seed=seed)


def _compared(workload: Workload, seed: int) -> list[Summary]:
    return [*(_run(name, workload, seed) for name in POLICIES), lower_bound(workload).summary(len(workload))]


def _run(name: str, workload: Workload, seed: int) -> Summary:
    with _progress(name, len(workload)) as advance:
        return run_policy(name, workload, POLICIES[name](workload, seed), seed=seed, progress=advance)


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda arrived: bar.update(task, completed=arrived)


@contextmanager
def _told() -> Iterator[None]:
    """Errors of what the caller gave end with exit code 2, an `error:` line and a `hint:` line."""
    try:
        yield
    except tuple(_HINTS) as error:
        hint = next(text for kind, text in _HINTS.items() if isinstance(error, kind))
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(str(error), err=True)
        click.secho("hint: ", fg="cyan", bold=True, nl=False, err=True)
        click.echo(hint, err=True)
        sys.exit(2)


if __name__ == "__main__":
    main(prog_name="python -m simulator")

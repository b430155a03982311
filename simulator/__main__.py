"""`python -m simulator`: `simulate` shows what policies attain and cost, `diff-config` what a configuration changes.

`plan` shows what to buy.

Data to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simulator.bounds.linear import lower_bound
from simulator.bounds.whole_devices import whole_bound
from simulator.demand import COLUMNS as PRICE_COLUMNS
from simulator.demand import InfeasibleError, PriceError, load_prices, offers
from simulator.engine import Summary
from simulator.engine import simulate as run_policy
from simulator.fleet import SERVICES, Fleet, FleetError, load_fleet
from simulator.history import day_of, trace_of_day
from simulator.planner import LOADS, PLAYS, Answer, Plan, fleet_plan, sensitivity, tables
from simulator.planner import plan as find_plan
from simulator.policies.taxiway import POLICIES
from simulator.reports import Comparison, compared, figures, json_lines, page, sample_line, sampled, usage
from simulator.reports import difference_table as difference
from simulator.traces import (
    AZURE,
    GENERIC,
    Trace,
    TraceError,
    is_spec,
    joined,
    read_trace,
    synthetic_trace,
    windows_of,
)
from simulator.trials import TRIALS
from simulator.tuning.command import tune
from simulator.workload import Workload, prepare
from taxiway.cli import USAGE, exit_on_error, report
from taxiway.cli.fleet import run
from taxiway.cli.show import stdout_console
from taxiway.errors import flaw

_PLANNED = Path(__file__).parent / "fleets" / "azure-plan.yaml"

SAMPLE, WINDOW = 3600.0, 450.0
"""Seconds that `diff-config` replays of a history, and of one window: two windows at least. A day at 16 requests/s
takes 1.5 h of processor time for each file, the sample 4 minutes."""

_HINTS: dict[type[Exception], str] = {
    TraceError: f"a trace is a CSV file with the header {','.join(AZURE)} or {','.join(GENERIC)}, or a text such as "
    "poisson:rate=50,duration=600,seed=1",
    FleetError: "docs/simulator.md explains every field; simulator/fleets/azure-mixed.yaml is an example",
    PriceError: f"a price file is a CSV file with the columns {','.join(PRICE_COLUMNS)}",
    InfeasibleError: "ask for a smaller share or a longer deadline, or give the fleet file more devices or faster ones",
    OSError: "name a file in an existing, writable folder",
}


@click.group()
def main() -> None:
    """Simulate the fleet under load, without the fleet."""


@main.command()
@click.option("--trace", "source", help="A CSV file, or a text such as poisson:rate=50,duration=600.")
@click.option("--fleet", "fleet_file", type=click.Path(path_type=Path), help="The fleet file (YAML).")
@click.option(
    "--trial", type=click.Choice(list(TRIALS)), help="Instead of trace and fleet: a trial with several models."
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="The folder of the Azure LLM traces, for a trial's language models; synthetic without.",
)
@click.option("--policy", "name", type=click.Choice(sorted(POLICIES)), default="taxiway", show_default=True)
@click.option("--compare", is_flag=True, help="Run every policy, and compute lower bounds on cost and score.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed.")
@click.option(
    "--load",
    type=click.FloatRange(0, 1000, min_open=True),
    default=1.0,
    show_default=True,
    help="Multiple of the trace's requests.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per policy.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a chart to this HTML file.")
def simulate(
    source: str | None,
    fleet_file: Path | None,
    trial: str | None,
    data: Path | None,
    name: str,
    compare: bool,
    seed: int,
    load: float,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Replay a trace on a modelled fleet, and print what policies attain and cost."""
    if bool(trial) == bool(source or fleet_file) or bool(source) != bool(fleet_file):
        raise click.UsageError("give either --trial, or --trace and --fleet")
    with _exit_on_error():
        if source and fleet_file:
            workload, what = _workload(source, fleet_file, seed=seed, load=load), f"{Path(source).name}"
        else:
            chosen = TRIALS[trial or ""]
            workload, what = chosen.workload(chosen.trace(seed, data).at_load(load, seed=seed)), f"the trial {trial}"
        summaries = _compared(workload, seed) if compare else [_run(name, workload, seed)]
        if as_json:
            click.echo(json_lines(summaries), nl=False)
        else:
            console = stdout_console()
            console.print(figures(summaries), "", usage(summaries))
        if plot is not None:
            title = "What each policy attains and costs"
            on = Path(workload.fleet.file).name
            subtitle = f"{len(workload):,} requests of {what} on {on}, load {load:g}, seed {seed}"
            plot.write_text(page(summaries, title=title, subtitle=subtitle), encoding="utf-8")


@main.command()
@click.argument("new_file", metavar="NEW.yaml", type=click.Path(path_type=Path))
@click.option("--fleet", "old_file", required=True, type=click.Path(path_type=Path), help="The old fleet file (YAML).")
@click.option(
    "--history",
    "source",
    required=True,
    help="What arrived: a CSV file of `taxiway history export`, another trace, or a UTC day such as 2026-11-27.",
)
@click.option(
    "--url", help="For a day: the state store, redis://… [TAXIWAY_STATE, TAXIWAY_BROKER, else the local fleet]."
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="For a day: data directory of a local fleet [TAXIWAY_DATA, else .taxiway].",
)
@click.option(
    "--sample",
    type=click.FloatRange(min=0),
    default=SAMPLE,
    show_default=True,
    help=f"Seconds to replay of a longer history, in windows of {WINDOW:g} s spread over it; 0 replays all.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: old, new and difference.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a chart to this HTML file.")
def diff_config(
    new_file: Path,
    old_file: Path,
    source: str,
    url: str | None,
    data: Path | None,
    sample: float,
    seed: int,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Replay a history under an old and a new configuration, and print what each attains and costs."""
    with _exit_on_error():
        old, new = load_fleet(old_file), load_fleet(new_file)
        day = day_of(source)
        trace = trace_of_day(url, data, day) if day else _trace(source, old)
        found = _difference(trace, (old, new), sample, seed)
        if as_json:
            click.echo(msgspec.json.encode(found))
        else:
            console = stdout_console()
            lines = [] if found.sample is None else [sample_line(found.sample)]
            console.print(*lines, difference(found), sep="\n")
        if plot is not None:
            subtitle = f"{len(trace):,} requests of {Path(source).name}, seed {seed}; old: {old_file}, new: {new_file}"
            dots = [msgspec.structs.replace(found.new, policy="new"), msgspec.structs.replace(found.old, policy="old")]
            title = "What the new configuration attains and costs"
            plot.write_text(page(dots, title=title, subtitle=subtitle), encoding="utf-8")


def _difference(trace: Trace, fleets: tuple[Fleet, Fleet], sample: float, seed: int) -> Comparison:
    """The history under both configurations, or windows of it that are about `sample` seconds together."""
    of = float(trace.arrival[-1])
    if not sample or of <= sample:
        return compared(*_both(trace, fleets, seed, ""))
    count = max(2, round(sample / WINDOW))
    parts = windows_of(trace, count=count, each=sample / count)
    runs = [_both(part, fleets, seed, f" {number} of {len(parts)}") for number, part in enumerate(parts, 1)]
    asked = [np.bincount(_replayed(part, fleets[0], seed).trace.service, minlength=len(SERVICES)) for part in parts]
    return sampled(runs, np.array(asked), count=count, each=sample / count, of=of)


def _both(trace: Trace, fleets: tuple[Fleet, Fleet], seed: int, which: str) -> tuple[Summary, Summary]:
    old, new = (
        _run("taxiway", _replayed(trace, fleet, seed), seed, label=f"{name}{which}")
        for name, fleet in zip(("old", "new"), fleets, strict=True)
    )
    return old, new


def _replayed(trace: Trace, fleet: Fleet, seed: int) -> Workload:
    """The history on a fleet.

    Raises:
        FleetError: the fleet does not run all of the history's models.
    """
    lacking = [name for name in trace.models if name not in fleet.timings]
    if lacking:
        raise FleetError(fleet.file, "classes", "classes that run every model of the history", lacking)
    return prepare(trace, fleet, seed=seed)


def _pairs(ctx: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` options as a mapping."""
    found: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not (name and equals and value) or name in found:
            raise click.BadParameter(f"expected NAME=VALUE, each name once, got {text!r}", ctx, option)
        found[name] = value
    return found


def _shares(ctx: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, float]:
    """`SERVICE=SHARE` options as a mapping."""
    found: dict[str, float] = {}
    for name, text in _pairs(ctx, option, values).items():
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = 0.0
        if name not in SERVICES or not 0 < found[name] <= 1:
            expected = f"one of {', '.join(SERVICES)} and a share above 0, at most 1"
            raise click.BadParameter(f"expected {expected}, got {name}={text}", ctx, option)
    return found


@main.command()
@click.option("--trace", "source", help="A CSV file, or a text such as poisson:rate=50,duration=600.")
@click.option(
    "--rate",
    "rates",
    multiple=True,
    metavar="MODEL=R",
    callback=_pairs,
    help="A model's requests per second, optionally with sizes: chat=5,size=800,output=100.",
)
@click.option(
    "--slo",
    required=True,
    multiple=True,
    metavar="SERVICE=SHARE",
    callback=_shares,
    help="The share of a service's requests to answer in time.",
)
@click.option("--prices", "price_file", required=True, type=click.Path(path_type=Path), help="The price file (CSV).")
@click.option(
    "--fleet", "fleet_file", default=_PLANNED, type=click.Path(path_type=Path), help="The fleet file [azure-plan.yaml]."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    source: str | None,
    rates: dict[str, str],
    slo: dict[str, float],
    price_file: Path,
    fleet_file: Path,
    seed: int,
    as_json: bool,
) -> None:
    """Find the cheapest instances that serve a load in time, and check them by a simulation."""
    if bool(source) == bool(rates):
        raise click.UsageError("give either --trace or --rate")
    with _exit_on_error():
        fleet = load_fleet(fleet_file)
        trace = _trace(source, fleet) if source else _at_rates(rates, seed)
        answer = _planned(trace, fleet, price_file, slo, seed)
    if as_json:
        click.echo(msgspec.json.encode(answer))
    else:
        stdout_console().print(*tables(answer), sep="\n")


def _at_rates(rates: dict[str, str], seed: int) -> Trace:
    """Poisson arrivals of each model."""
    each = [
        synthetic_trace(f"poisson:rate={rate},seed={seed + number}", model=model)
        for number, (model, rate) in enumerate(rates.items())
    ]
    return joined(each)


def _planned(trace: Trace, fleet: Fleet, price_file: Path, slo: dict[str, float], seed: int) -> Answer:
    """The plan for the trace, and those for other loads."""
    offered = offers(fleet, load_prices(price_file))

    def loaded(load: float) -> Workload:
        return prepare(trace.at_load(load, seed=seed), fleet, seed=seed)

    def planned(load: float) -> Plan:
        return find_plan(
            loaded(load), offered, slo, lambda what, on: _run("taxiway", on, seed, label=f"×{load:g} {what}")
        )

    found = planned(1.0)
    loads = [sensitivity(load, found if load == 1.0 else _tried(planned, load)) for load in LOADS]
    with _progress("fleet plan", PLAYS) as advance:
        followed = fleet_plan(loaded(1.0), offered, found, seed=seed, progress=advance)
    return Answer(slo=slo, plan=found, loads=loads, fleet_plan=followed)


def _tried(planned: Callable[[float], Plan], load: float) -> Plan | InfeasibleError | TraceError:
    try:
        return planned(load)
    except (InfeasibleError, TraceError) as error:
        return error


def _workload(source: str, fleet_file: Path, *, seed: int, load: float) -> Workload:
    fleet = load_fleet(fleet_file)
    return prepare(_trace(source, fleet).at_load(load, seed=seed), fleet, seed=seed)


def _trace(source: str, fleet: Fleet) -> Trace:
    model = fleet.default_model
    return synthetic_trace(source, model=model) if is_spec(source) else read_trace(Path(source), model=model)


def _compared(workload: Workload, seed: int) -> list[Summary]:
    runs = [_run(name, workload, seed) for name in POLICIES]
    bounds = [lower_bound(workload).summary()]
    if any(workload.fleet.penalties):  # without them nothing is the cheapest answer
        bounds.append(whole_bound(workload).summary())
    return [*runs, *bounds]


def _run(name: str, workload: Workload, seed: int, *, label: str = "") -> Summary:
    with _progress(label or name, len(workload)) as advance:
        return run_policy(name, workload, POLICIES[name](workload, seed), seed=seed, progress=advance)


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
        said = f"{error.filename}: {flaw(error)}" if isinstance(error, OSError) else str(error)
        report(said, next(text for kind, text in _HINTS.items() if isinstance(error, kind)))
        sys.exit(USAGE)


main.add_command(tune)

if __name__ == "__main__":
    run(main, "python -m simulator")

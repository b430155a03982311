"""Does taxiway's placement beat what a good operator would do, where several models compete for unlike hardware?

`python -m lab.trials` plays each trial (`lab.trials.trial`) with each seed under taxiway and its opponents, and
computes lower bounds. It prints what each attains, costs and scores, whether taxiway's targets hold, and writes a
chart. Opponents know the first half of the trace. taxiway knows nothing, or with `--warm` another seed's arrivals.

Traces are written by the recipes of the shared trials where these are present, which know further kinds by name,
otherwise drawn by `lab.trials.trial`, with language models as in `--data`'s Azure traces or synthetic.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.harness.bars import Bar, Panel, write_chart
from benchmarks.harness.measure import CHARTS, machine
from lab.baselines import EVERY_POLICY
from lab.bounds.whole_devices import NAME as WHOLE
from lab.trials.runs import BOUNDS, EARLIER, OURS, Run, Source, Task, play, write_traces
from lab.trials.targets import OPPONENTS, PLAN, Target, targets
from lab.trials.trial import TRIALS
from simulator.fleet import SERVICES
from simulator.reports import percent
from tasks.settings import TREE

SHARED = TREE.parent / "shared" / "trials"
RECIPES = (SHARED / "make_trials.py", SHARED / "kinds" / "make.py")

PLAYED = (OURS, *OPPONENTS, PLAN, "per-request", "static", "least-work", "central-queue", *BOUNDS)

SEEDS = (7, 8, 9)


def tasks(given: argparse.Namespace, source: Source) -> list[Task]:
    """Every run, those that take longest first."""
    return [
        Task(source, trial, seed, policy, given.warm)
        for policy in sorted(given.policy or PLAYED, key=lambda name: name not in (OURS, *OPPONENTS, PLAN))
        for trial in given.trial or TRIALS
        for seed in given.seeds
    ]


def played(todo: Sequence[Task], jobs: int) -> list[Run]:
    """All runs in `jobs` processes, with a progress bar on a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs = []
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        shown = bar.add_task("trials", total=len(todo))
        for done in as_completed([pool.submit(play, task) for task in todo]):
            runs.append(done.result())
            bar.update(shown, advance=1, description=f"{runs[-1].trial} {runs[-1].seed} {runs[-1].policy}")
    order = {(task.trial, task.seed, task.policy): place for place, task in enumerate(todo)}
    return sorted(runs, key=lambda run: order[run.trial, run.seed, run.policy])


def by_policy(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of each policy, lowest mean score first; bounds last."""
    names = dict.fromkeys(run.policy for run in runs)
    grouped = [[run for run in runs if run.policy == name] for name in names]
    return sorted(grouped, key=lambda group: (group[0].policy in BOUNDS, fmean(run.score for run in group)))


def table(trial: str, runs: Sequence[Run]) -> Table:
    """The policies' means over the seeds."""
    heads = ("policy", *SERVICES, "worst model", "cost", "score", "range", "starts", "idle", "changes")
    shown = Table(*heads, title=f"\n{trial}, means of {len({run.seed for run in runs})} seeds", box=None)
    shown.title_justify = "left"
    for group in by_policy(runs):
        shown.add_row(*_cells(group), style="bold" if group[0].policy == OURS else None)
    return shown


def _cells(group: Sequence[Run]) -> Iterator[str]:
    yield group[0].policy
    for service in SERVICES:
        shares = [share for run in group if (share := run.attainment[service]) is not None]
        yield percent(fmean(shares) if shares else None)
    models = list(group[0].live_by_model)
    worst = min(((fmean(run.live_by_model[model] for run in group), model) for model in models), default=None)
    yield f"{worst[1]} {percent(worst[0])}" if worst else "–"
    yield f"${fmean(run.cost_usd for run in group):.2f}"
    yield f"{fmean(run.score for run in group):.2f}"
    yield f"{min(run.score for run in group):.2f}–{max(run.score for run in group):.2f}"
    yield f"${fmean(run.starts_usd for run in group):.2f}"
    yield f"${fmean(run.idle_usd for run in group):.2f}"
    yield str(max((count for run in group for count in run.changes.values()), default=0))


def panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """The scores on each trial as bars."""
    for trial in dict.fromkeys(run.trial for run in runs):
        here = [run for run in runs if run.trial == trial]
        bars = [
            Bar(group[0].policy, [run.score for run in group], own=group[0].policy == OURS)
            for group in by_policy(here)
            if group[0].policy not in BOUNDS
        ]
        bound = [run.score for run in here if run.policy == WHOLE]
        yield Panel(
            trial, "USD", bars, "Cost and penalties: lower is better.", (fmean(bound), WHOLE) if bound else None
        )


def judged(runs: Sequence[Run], *, warm: bool) -> list[Target]:
    """The targets of every trial."""
    trials = {trial: [run for run in runs if run.trial == trial] for trial in dict.fromkeys(run.trial for run in runs)}
    return [target for trial, here in trials.items() for target in targets(trial, here, warm=warm)]


def main() -> None:
    """Play all, print figures and targets, and draw the chart."""
    given = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        source = Source(data=given.data)
        if given.data is None and SHARED.exists():
            seeds = [*given.seeds, *(seed + EARLIER for seed in given.seeds if given.warm)]
            write_traces(RECIPES, Path(folder), seeds)
            source = Source(Path(folder))
        known = [*TRIALS, *sorted({file.stem for file in Path(folder).glob("*/*.yaml")})]
        if unknown := [trial for trial in given.trial or () if trial not in known]:
            raise SystemExit(f"--trial: expected some of {', '.join(known)}, got {', '.join(unknown)}")
        runs = played(tasks(given, source), given.jobs)
    show(runs, judged(runs, warm=given.warm), as_json=given.json)
    about = f"{'warm' if given.warm else 'cold'}, seeds {given.seeds}, commit {machine()['commit']}"
    write_chart(given.chart, "Placement of several models on unlike hardware", about, list(panels(runs)))


def show(runs: Sequence[Run], held: Sequence[Target], *, as_json: bool) -> None:
    """Print runs as JSON lines, or a table of means for each trial; targets go to stderr beside JSON."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    if as_json:
        sys.stdout.writelines(msgspec.json.encode(run).decode() + "\n" for run in runs)
        console = Console(width=140, stderr=True)
    else:
        for trial in dict.fromkeys(run.trial for run in runs):
            console.print(table(trial, [run for run in runs if run.trial == trial]))
    for target in held:
        console.print(f"{'holds' if target.holds else 'FAILS'}  {target.trial}: {target.target}: {target.because}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab.trials", description=__doc__)
    parser.add_argument("--trial", action="append", help=f"{', '.join(TRIALS)}, or one of the shared kinds")
    parser.add_argument("--policy", action="append", choices=[*EVERY_POLICY, *BOUNDS], help=f"{', '.join(PLAYED)}")
    parser.add_argument("--seeds", type=_seeds, default=list(SEEDS), help="of the traces: 7,8,9")
    warmth = parser.add_mutually_exclusive_group()
    warmth.add_argument(
        "--cold", dest="warm", action="store_false", default=False, help="taxiway knows no earlier arrivals (default)"
    )
    warmth.add_argument(
        "--warm", action="store_true", help=f"taxiway has the arrivals of seed + {EARLIER} as its history"
    )
    parser.add_argument("--data", type=Path, help="the folder of the Azure traces, instead of the shared recipe")
    parser.add_argument("--jobs", type=int, default=max((os.cpu_count() or 2) // 2, 1), help="processes")
    parser.add_argument("--json", action="store_true", help="print one JSON object per run")
    parser.add_argument("--chart", type=Path, default=CHARTS / "trials.html", help="where the chart is written")
    return parser.parse_args()


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers such as 7,8,9, got {text!r}") from None


if __name__ == "__main__":
    main()

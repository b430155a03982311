"""What is each term of the cost model, and each kind of move, worth? An ablation: all but one of them, against all.

`python -m lab.ablations` plays both Azure traces at half the load at which static routing answers 95 % of live
requests in time, and at that load, and a synthetic trace on `ablations.yaml`, where models do not fit together, devices
start cold and some are spot; with `--trace steady` or another trial's name, that trial, in which several models compete
for a device. It prints what each term changes in attainment (points) and in cost; `--json` prints one
JSON line per figure. A term is disabled in the candidate table, constant or rule table that the decision reads; the
decision itself has no switches. Other horizons, and one central queue that binds each job at the last moment, are
compared, too.

The simulator has no links and no shadow prices, so transfer, egress and shadow price have no effect here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.harness.measure import machine, say
from lab.baselines import EVERY_POLICY, run
from lab.bounds.linear import Bound, lower_bound
from lab.fleet_file import load_fleet, prepare
from lab.policies import TRACES, Bench, Figure, mean, parser
from lab.rows import joined, synthetic_trace
from lab.trials.trial import TRIALS
from router.decide import placement
from router.decide.candidates import CandidateTable
from router.decide.moves import rebalance
from router.decide.moves.rebalance import Kind, Rows, View
from router.decide.working_snapshot import WorkingSnapshot
from simulator.fleet import SERVICES
from simulator.policies.taxiway import Maker, Taxiway
from simulator.traces import Trace
from simulator.workload import SimulatedJob, Workload
from tasks.topology import Rebalance

FLEET = Path(__file__).with_name("ablations.yaml")

MIXED = "mixed"
"""The name of the synthetic trace."""

RATES = {"rank": 4.0, "embed": 10.0, "vision": 0.3}
"""Requests a second of each model of the synthetic trace, in bursts of four times as many."""

SHARES = (0.5, 1.0)

WORTHLESS = 0.001
"""A term is worthless here if it changes attainment by at most this, and cost by at most ten times as much."""


@dataclass(frozen=True, slots=True)
class Term:
    """A term of the cost model, and how it is disabled.

    Columns of the candidate table and constants of `router.decide.placement` are replaced, and moves of these `kinds`
    are disabled.
    """

    name: str
    columns: Callable[[CandidateTable], dict[str, Any]] = lambda table: {}
    constants: Mapping[str, float] = field(default_factory=dict)
    kinds: tuple[Kind, ...] = ()

    def without(self, table: CandidateTable) -> CandidateTable:
        """The candidate table without the term."""
        return replace(table, **self.columns(table))

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """The constants without the term."""
        with ExitStack() as stack:
            for name, value in self.constants.items():
                stack.callback(setattr, placement, name, getattr(placement, name))
                setattr(placement, name, value)
            for kind in self.kinds:
                stack.callback(rebalance.WANTED.__setitem__, kind, rebalance.WANTED[kind])
                rebalance.WANTED[kind] = _nowhere
            yield


def _all(column: str, value: float) -> Callable[[CandidateTable], dict[str, Any]]:
    """A column of the candidate table with the same figure for every candidate."""
    return lambda table: {column: np.full_like(getattr(table, column), value)}


def _horizon(seconds: float) -> Callable[[CandidateTable], dict[str, Any]]:
    """The same horizon for every class that is not reserved; reserved classes keep their own."""
    return lambda table: {"horizon": np.where(table.reserved, table.horizon, seconds)}


def _nowhere(view: View, rules: Rebalance) -> Rows:
    return np.zeros_like(view.finish, dtype=bool)


TERMS = (
    Term("all terms"),
    Term("wait", _all("concurrent", np.inf)),
    Term("cold start", _all("load", 0.0)),
    Term("load share", lambda table: {"sharers": np.inf}),
    Term("full batch", lambda table: {"billed": None}),
    Term("blocking", _all("blocking", 0.0)),
    Term("residual", _all("residual", 1.0)),
    Term("company", _all("slope", 0.0)),
    Term("price", _all("dollars", 1.0)),
    Term("shadow price", _all("shadow", 0.0)),
    Term("spot loss", _all("spot_loss", 0.0)),
    Term("transfer", lambda table: _all("link_delay", 0.0)(table) | _all("link_seconds", 0.0)(table)),
    Term("egress", _all("egress", 0.0)),
    Term("holding", _horizon(np.inf)),
    Term("reserve", _all("reserved", False)),
    Term("warm preference", constants={"WARM_PREFERENCE": 0.0}),
    Term("two choices", constants={"NEAR": 1.0}),
    Term("rescue", kinds=(Kind.RESCUE,)),
    Term("save", kinds=(Kind.SAVE,)),
    Term("balance", kinds=(Kind.BALANCE,)),
    Term("all moves", kinds=tuple(Kind)),
    *(Term(f"horizon {seconds:g} s", _horizon(seconds)) for seconds in (1, 5, 30, 300)),
)
"""The whole model, then the model without each term, and with other horizons."""

CENTRAL = "central-queue"
"""The policy that binds every job at the last moment, for comparison."""


class Without(Taxiway):
    """The router's decision on candidate tables that lack a term."""

    def __init__(self, workload: Workload, term: Term) -> None:
        super().__init__(workload)
        self._term = term

    def _table(self, job: SimulatedJob, working: WorkingSnapshot) -> CandidateTable:
        return self._term.without(super()._table(job, working))


@dataclass(frozen=True, slots=True)
class Scene:
    """A trace at a share of a load: its workloads by seed, each with its lower bound."""

    trace: str
    share: float
    load: float
    workloads: Mapping[int, Workload]
    bounds: Mapping[int, Bound]

    @classmethod
    def of(cls, trace: str, share: float, load: float, workloads: Mapping[int, Workload]) -> Scene:
        """The scene with its lower bounds."""
        return cls(trace, share, load, workloads, {seed: lower_bound(each) for seed, each in workloads.items()})

    def without(self, term: Term) -> Figure:
        """Mean attainment and cost of placement without the term, over the seeds."""
        with term.switched_off():
            return self.played(term.name, lambda on, chance: Without(on, term))

    def played(self, name: str, make: Maker) -> Figure:
        """Mean attainment and cost of a policy, over the seeds."""
        runs = []
        for seed, workload in self.workloads.items():
            found = run(name, make, workload, seed)
            runs.append((found, self.bounds[seed].of(found.attainment)))
        return mean(self.trace, self.share, self.load, runs)


def worthless(with_all: Figure, without: Figure) -> bool:
    """Whether leaving the term out changes nothing."""
    moved = [abs(getattr(with_all, name) - getattr(without, name)) for name in SERVICES]
    return max(moved) <= WORTHLESS and abs(without.cost / with_all.cost - 1) <= 10 * WORTHLESS


def mixed(seed: int) -> Workload:
    """Several models at once, in bursts."""
    fleet = load_fleet(FLEET)
    return prepare(joined([_bursts(name, rate, seed) for name, rate in RATES.items()]), fleet, seed=seed)


def drawn(trace: str, seed: int, data: Path) -> Workload:
    """The synthetic trace or a trial, which have loads of their own."""
    return mixed(seed) if trace == MIXED else TRIALS[trace].workload(TRIALS[trace].trace(seed, data))


def _bursts(model: str, rate: float, seed: int) -> Trace:
    spec = f"mmpp:low={rate},high={4 * rate},stay=60,duration=600,size=100,output=0,seed={seed}"
    return synthetic_trace(spec, model=model)


def table(figures: Sequence[Figure]) -> Table:
    """The worth of each term on one trace at one load: the attainment in points and the cost lost without it."""
    whole = figures[0]
    title = f"\n{whole.trace}, {whole.share:g} of load {whole.load:.2f}: what leaving a term out changes"
    shown = Table("without", *SERVICES, "cost", "", title=title, box=None, title_justify="left")
    for each in figures:
        if each is whole:
            attained = [f"{100 * getattr(each, name):.1f} %" for name in SERVICES]
            shown.add_row("nothing", *attained, f"${each.cost:.2f}", "")
            continue
        points = [f"{100 * (getattr(each, name) - getattr(whole, name)):+.1f}" for name in SERVICES]
        verdict = "worth nothing" if worthless(whole, each) else ""
        shown.add_row(each.policy, *points, f"{100 * (each.cost / whole.cost - 1):+.1f} %", verdict)
    return shown


def main() -> None:
    """Simulate all variants, and print the worth of each term."""
    own = (MIXED, *TRIALS)
    options = parser("ablations", __doc__, (*TRACES, *own))
    options.add_argument("--share", action="append", type=float, help=f"of the load; {SHARES}, unless named")
    options.add_argument("--term", action="append", choices=[term.name for term in TERMS[1:]], help="all, unless named")
    given = options.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    terms = [term for term in TERMS if term is TERMS[0] or not given.term or term.name in given.term]
    bench, seeds = Bench(given.data, given.part), range(1, given.seeds + 1)
    for trace in given.trace or (*TRACES, MIXED):
        load = 1.0 if trace in own else given.load or bench.saturation(trace, seeds[0])
        for share in (1.0,) if trace in own else given.share or SHARES:
            workloads = {
                s: drawn(trace, s, given.data) if trace in own else bench.workload(trace, load * share, s)
                for s in seeds
            }
            figures = play(Scene.of(trace, share, load, workloads), terms, as_json=given.json)
            if not given.json:
                console.print(table(figures))


def play(scene: Scene, terms: Sequence[Term], *, as_json: bool) -> list[Figure]:
    """Simulate the scene with the whole model, then without each term; `as_json` prints each result as a JSON line."""
    figures: list[Figure] = []
    rows: list[Term | str] = [*terms, CENTRAL]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for row in progress.track(rows, description=f"{scene.trace} {scene.share:g}"):
            whole = row is TERMS[0]
            figures.append(scene.played(row, EVERY_POLICY[row]) if isinstance(row, str) else scene.without(row))
            if as_json:
                nothing = not whole and worthless(figures[0], figures[-1])
                say({"question": "without a term", **machine(), **asdict(figures[-1]), "worthless": nothing})
    return figures


if __name__ == "__main__":
    main()

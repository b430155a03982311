"""What do all policies attain and cost on a trace, beside lower bounds on cost and score?

`python -m lab.compare --trace TRACE --fleet FILE` prints a table, or with `--json` one JSON object per policy and
bound. With `--yields`, what placements attain where running generations yield to urgent ones, and where they do not.
A trace is a CSV file or a text such as `poisson:rate=50,duration=600,seed=1`, as for `taxiway simulate`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from lab.baselines import EVERY_POLICY, run
from lab.bounds.linear import lower_bound
from lab.bounds.whole_devices import whole_bound
from lab.fleet_file import FleetError, load_fleet, prepare
from lab.rows import read_trace, synthetic_trace
from lab.yielding import yielded
from simulator.engine import RunSummary
from simulator.reports import figures, json_lines, usage
from simulator.traces import TraceError, is_spec
from simulator.workload import Workload


def compared(workload: Workload, seed: int) -> Iterator[RunSummary]:
    """Every policy's figures, then those of the bounds."""
    for name, make in EVERY_POLICY.items():
        yield run(name, make, workload, seed)
    yield lower_bound(workload).summary()
    if any(workload.fleet.penalties):  # without them nothing is the cheapest answer
        yield whole_bound(workload).summary()


def main() -> None:
    """Play every policy, compute the bounds, and print both."""
    parser = argparse.ArgumentParser(prog="python -m lab.compare", description=__doc__)
    parser.add_argument("--trace", required=True, help="a CSV file, or a text such as poisson:rate=50,duration=600")
    parser.add_argument("--fleet", type=Path, required=True, help="a fleet file")
    parser.add_argument("--load", type=float, default=1.0, help="multiple of the trace's requests")
    parser.add_argument("--yields", action="store_true", help="generations that yield, instead of policies and bounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object per policy and bound")
    given = parser.parse_args()
    try:
        fleet = load_fleet(given.fleet)
        model = fleet.default_model
        spec = is_spec(given.trace)
        trace = synthetic_trace(given.trace, model=model) if spec else read_trace(Path(given.trace), model=model)
        workload = prepare(trace.at_load(given.load, seed=given.seed), fleet, seed=given.seed)
    except (TraceError, FleetError) as error:
        parser.error(str(error))
    summaries = list((yielded if given.yields else compared)(workload, given.seed))
    if given.json:
        sys.stdout.write(json_lines(summaries))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(figures(summaries), "", usage(summaries), sep="\n")


if __name__ == "__main__":
    main()

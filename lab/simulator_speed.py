"""How many requests per second does the simulator process on one core, by policy?

`python -m lab.simulator_speed` makes a Poisson trace of a million requests at a load that the example fleet can
serve, and simulates each policy. It prints one JSON line per policy: requests per second of processor time, the total
seconds, and the process's peak memory.
"""

from __future__ import annotations

import argparse
import resource
import time

from benchmarks.harness.measure import machine, say
from lab.changes import simulate
from lab.fleet_file import load_fleet, prepare
from lab.rows import synthetic_trace
from simulator.policies.taxiway import POLICIES
from tasks.settings import TREE

FLEET = TREE / "lab" / "fleets" / "azure-mixed.yaml"

RATE = 50
"""Requests a second: about nine times those of the Azure chat trace."""

SEED = 1


def main() -> None:
    """Measure, and print one JSON line a policy."""
    parser = argparse.ArgumentParser(prog="python -m lab.simulator_speed", description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--policy", action="append", choices=sorted(POLICIES), help="all, unless named")
    given = parser.parse_args()
    for name in given.policy or POLICIES:
        say({"question": f"simulator requests/s, {name}", **machine(), **measured(name, given.requests)})


def measured(name: str, requests: int) -> dict[str, object]:
    """Requests per second of processor time, from the generation of the trace to the summary."""
    began = time.process_time()
    fleet = load_fleet(FLEET)
    trace = synthetic_trace(f"poisson:rate={RATE},duration={requests / RATE},seed={SEED}", model=fleet.default_model)
    workload = prepare(trace, fleet, seed=SEED)
    simulate(name, workload, POLICIES[name](workload, SEED), seed=SEED)
    taken = time.process_time() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "repeats": 1,
        "median": round(len(workload) / taken),
        "seconds": round(taken, 1),
        "requests": len(workload),
        "memory": memory,
    }


if __name__ == "__main__":
    main()

"""Every policy by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from simulator.policies.balancing import JoinShortestQueue, LeastWork, PowerOfTwo
from simulator.policies.blind import AlwaysCheapest, AlwaysFastest, Random, RoundRobin, Static
from simulator.policies.central import Central
from simulator.policies.fixed import Fixed
from simulator.policies.policy import Policy
from simulator.policies.spilling import ClairvoyantDeadline, DeadlineSpill, InfaasLike, ThresholdSpill
from simulator.policies.taxiway import Taxiway
from simulator.policies.tuned import Tuned
from simulator.traces.workload import Workload
from simulator.tuning.opponents import pinned, tuned_plan, tuned_split

Maker = Callable[[Workload, int], Policy]
"""Makes a policy for one run, from the workload (its fleet and models) and a seed."""


def taxiway(workload: Workload, seed: int, history: Workload | None = None) -> Policy:
    """The router with its tuner, which may know a `history`; without penalties there is nothing to tune for."""
    if not any(workload.fleet.penalties):
        return Taxiway(workload, seed=seed)
    return Tuned(workload, seed=seed, history=history)


POLICIES: Mapping[str, Maker] = {
    "taxiway": lambda workload, seed: taxiway(workload, seed),
    "per-request": lambda workload, seed: Taxiway(workload, seed=seed),
    "tuned-split": lambda workload, seed: Fixed(tuned_split(workload, seed)),
    "pinned": lambda workload, seed: Fixed(pinned(workload, seed)),
    "tuned-plan": lambda workload, seed: Fixed(tuned_plan(workload, seed)),
    "static": lambda workload, seed: Static(),
    "random": lambda workload, seed: Random(seed),
    "round-robin": lambda workload, seed: RoundRobin(),
    "join-shortest-queue": lambda workload, seed: JoinShortestQueue(),
    "least-work": lambda workload, seed: LeastWork(),
    "power-of-two": lambda workload, seed: PowerOfTwo(seed),
    "always-fastest": lambda workload, seed: AlwaysFastest(),
    "always-cheapest": lambda workload, seed: AlwaysCheapest(),
    "threshold-spill": lambda workload, seed: ThresholdSpill(),
    "infaas-like": lambda workload, seed: InfaasLike(),
    "deadline-spill": lambda workload, seed: DeadlineSpill(),
    "central-queue": lambda workload, seed: Central(),
    "clairvoyant-edf": lambda workload, seed: ClairvoyantDeadline(),
}
"""taxiway with its plans and without, what an operator would tune, the baselines, and the clairvoyant policy."""

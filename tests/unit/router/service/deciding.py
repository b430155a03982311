"""A router's decision for an arrival, in one step."""

from broker.port import Arrival
from router.decide.working_snapshot import WorkingSnapshot
from router.service.admission import Rules
from router.service.decision import Decision, decide_read, read


def decide(arrival: Arrival, rules: Rules, working: WorkingSnapshot, now: float) -> Decision:
    """What a router does with it."""
    return decide_read(read(arrival, rules, now), rules, working)

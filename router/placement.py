"""Chooses where a request runs: the cheapest candidate that meets its deadline, and says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.classify import Candidate, Needs, Refusal, classify
from router.cost import Estimate, estimate
from router.fleet import FleetSnapshot
from tasks.catalogue import Model
from tasks.topology import Topology
from taxiway.errors import InvalidRequestError, NoDeviceError, OverloadedError, UnplaceableError

GUARANTEE = 2.0
"""A finish time is trusted at this multiple, until residuals are learned (DESIGN §7: R starts at 2.0)."""

RETRY_AFTER = 5.0
"""Seconds after which a fleet without the right device is worth asking again: a worker's start, about."""

WARM_PREFERENCE = 1.15
"""A warm candidate is taken over a cold one up to this multiple of its cost (DESIGN §7)."""


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate with its figures, as it stood in the choice."""

    candidate: Candidate
    estimate: Estimate

    @property
    def guaranteed(self) -> float:
        """Seconds within which the answer is there, in all likelihood."""
        return self.estimate.finish * GUARANTEE


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request runs, why, and what was not chosen. `level` is the queue's priority level, 0 first.

    `options` come cheapest first. Every class and variant of the model is in `options` or in `refusals`.
    """

    chosen: Option
    level: int
    reason: str
    options: tuple[Option, ...]
    refusals: tuple[Refusal, ...]

    def variants(self) -> dict[str, str]:
        """The variant for each hardware class that the job may run on: the cheapest one that the class has."""
        best = {o.candidate.hardware_class: o for o in sorted(self.options, key=_order, reverse=True)}
        best[self.chosen.candidate.hardware_class] = self.chosen
        return {name: o.candidate.variant_name for name, o in sorted(best.items())}


def place(model: Model, needs: Needs, topology: Topology, fleet: FleetSnapshot) -> Placement:
    """Choose a hardware class and a variant.

    Raises:
        UnplaceableError: nothing in this fleet can ever run it; it has each candidate's reason.
        InvalidRequestError: everything that could run it costs more than its budget.
        NoDeviceError: what could run it has no live device.
        OverloadedError: it cannot be done by its deadline, and could be when queues are shorter.
    """
    known = FleetSnapshot(stale=True) if fleet.stale else fleet
    candidates, refusals = classify(model, needs, topology, known)
    if not candidates:
        raise _unplaceable(model, refusals)
    options = sorted((Option(c, estimate(c, model, needs, known)) for c in candidates), key=_order)
    options, absent = _present(options, model, stale=fleet.stale)
    options, dear = _affordable(options, model, needs)
    chosen, reason = _choose(options, needs)
    if fleet.stale:
        reason = f"by queues.yaml alone, for the fleet's state could not be read: {reason}"
    return Placement(chosen, needs.level, reason, tuple(options), (*refusals, *absent, *dear))


def _choose(options: Sequence[Option], needs: Needs) -> tuple[Option, str]:
    cheapest = min(options, key=_order)
    if needs.deadline is None:
        return cheapest, "cheapest; no deadline"
    sure = [o for o in options if o.guaranteed <= needs.deadline]
    if sure:
        chosen = _prefer_warm(sure)
        ruled_out = _order(cheapest) < _order(chosen) and cheapest.guaranteed > needs.deadline
        why = f"; {_name(cheapest)} is cheaper and would take {cheapest.guaranteed:.3g} s" if ruled_out else ""
        return chosen, f"cheapest that meets {needs.deadline:g} s (guaranteed in {chosen.guaranteed:.3g} s){why}"
    earliest = min(options, key=lambda o: (o.estimate.finish, _order(o)))
    finish = earliest.estimate.finish
    if finish <= needs.deadline:
        return earliest, f"earliest, expected in {finish:.3g} s; nothing is sure to meet {needs.deadline:g} s"
    if any(o.estimate.finish - o.estimate.wait <= needs.deadline for o in options):
        raise OverloadedError(
            f"expected in {finish:.3g} s at the earliest ({_name(earliest)}), the deadline is {needs.deadline:g} s",
            retry_after=_drained_in(options, needs.deadline),
        )
    return earliest, f"earliest; no idle device would meet {needs.deadline:g} s ({finish:.3g} s expected)"


def _drained_in(options: Sequence[Option], deadline: float) -> float:
    """Seconds until some queue is short enough, if nothing joins it."""
    late = [o.estimate for o in options if o.estimate.finish - o.estimate.wait <= deadline]
    return min(e.finish - deadline for e in late)


def _prefer_warm(sure: Sequence[Option]) -> Option:
    cheapest = min(sure, key=_order)
    warm = [o for o in sure if o.estimate.warm and o.estimate.cost <= WARM_PREFERENCE * cheapest.estimate.cost]
    return min(warm, key=_order) if warm else cheapest


def _present(options: list[Option], model: Model, *, stale: bool) -> tuple[list[Option], list[Refusal]]:
    """The options that have a live device, all when the fleet could not be read; the others are refused."""
    live = [o for o in options if o.estimate.live or stale]
    if not live:
        classes = sorted({o.candidate.hardware_class for o in options})
        raise NoDeviceError(
            f"{model.id} runs on {', '.join(classes)}, and no device of these is live", retry_after=RETRY_AFTER
        )
    absent = [o for o in options if not (o.estimate.live or stale)]
    return live, [_refused(o, "no device of the class is live") for o in absent]


def _affordable(options: list[Option], model: Model, needs: Needs) -> tuple[list[Option], list[Refusal]]:
    """The options within the budget; the others are refused. `options` come cheapest first."""
    if needs.budget is None:
        return options, []
    within = [o for o in options if o.estimate.cost <= needs.budget]
    if not within:
        least = options[0].estimate.cost
        raise InvalidRequestError(
            f"budget: expected at least {least:.6g} USD for {model.id}, got {needs.budget:g}",
            field="budget",
            least=least,
        )
    dear = options[len(within) :]
    return within, [_refused(o, f"costs {o.estimate.cost:.3g} USD, over the budget of {needs.budget:g}") for o in dear]


def _refused(option: Option, reason: str) -> Refusal:
    return Refusal(option.candidate.hardware_class, option.candidate.variant_name, reason, ever=False)


def _unplaceable(model: Model, refusals: Sequence[Refusal]) -> UnplaceableError | NoDeviceError:
    table = [{"hardware_class": r.hardware_class, "variant": r.variant, "reason": r.reason} for r in refusals]
    lines = "; ".join(f"{r.hardware_class}/{r.variant}: {r.reason}" for r in refusals)
    message = f"no device can run {model.id}: {lines}"
    if all(r.ever for r in refusals):
        return UnplaceableError(message, refusals=table)
    return NoDeviceError(message, refusals=table, retry_after=RETRY_AFTER)


def _order(option: Option) -> tuple[float, float, str, str]:
    candidate = option.candidate
    return (option.estimate.cost, option.estimate.finish, candidate.hardware_class, candidate.variant_name)


def _name(option: Option) -> str:
    return f"{option.candidate.hardware_class}/{option.candidate.variant_name}"

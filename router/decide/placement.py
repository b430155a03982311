"""Chooses where a request runs: the cheapest candidate that meets its deadline, with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from router.decide.candidates import CandidateTable
from router.decide.classify import Candidate, Needs, Refusal
from router.decide.cost import (
    EstimateColumns,
    any_true,
    blocks_for,
    dearest,
    estimate_figures,
    full_batch,
    horizon,
    metered_cost,
    read_before,
)
from tasks.models.profiles import UNSURE
from taxiway.errors import InvalidRequestError, NoDeviceError, OverloadedError, UnplaceableError

RETRY_AFTER = 5.0
"""Seconds after which to retry when the fleet lacks the right device: about a worker's start."""

NEAR = 1.10
"""Candidates up to this multiple of the cheapest count as equally cheap."""

WARM_PREFERENCE = 1.15
"""A warm candidate is preferred over a cold one up to this multiple of its cost, and further, up to
`UNSURE`, where the cold one's estimate errs by more (`CandidateTable.residual`)."""

LATENESS_REFUSED = 10.0
"""Under a plan, a request is refused only if it is expected after this many times its deadline.

The plan was simulated with its late requests, and an estimate errs: refusing what merely looked late cost up to 11
points of live attainment on the trial `drift`. Where the plan itself expects many of these requests late
(`plan.SCARCE`), those that look late are refused at once: accepted, they would only make others late."""

RESERVED_SHARE = 0.25
"""A reserved class takes other services' work while its backlog is below this share of its horizon.

Source: `taxiway simulate` on the Azure conversation trace at load 17: admitting all work that no other class has in
time costs 2.5 points of live attainment, and gains 0.9 points of standard work's."""

SURELY = 0.8
"""A request leaves its planned class only for a candidate whose `at_most` is within this share of its deadline."""

SLACK = 0.01
"""Share of a request's deadline and of its queue's horizon by which the wait may change before requests like it are
placed again, where they have one candidate to choose: estimates err by far more."""

HALF_BUSY = 0.5
"""A request leaves its planned class only for a candidate with less work ahead of it than this share of a full batch.

Source of both: lab/trials. Leaving for candidates that were only likely to be in time was worse on every trial."""

_ANY = 2**31  # runs: no limit of attempts is as high


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where a request runs, and why. The reason is computed on demand.

    A `held` placement is not bound to its candidate: every queue that could take the request exceeds its horizon, and
    it waits until one does not.
    """

    table: CandidateTable
    needs: Needs
    figures: EstimateColumns
    index: int  # the chosen candidate's row in the table
    why: Callable[[int], str]
    held: bool = False
    leaves: bool = False  # it leaves the class that the plan prefers

    @property
    def reason(self) -> str:
        """Why this candidate was chosen, or the request held."""
        return self.why(self.index)

    @property
    def level(self) -> int:
        """The queue's priority level, 0 first."""
        return self.needs.level

    @property
    def candidate(self) -> Candidate:
        """The chosen hardware class and variant."""
        return self.table.candidates[self.index]

    @property
    def work(self) -> float:
        """Device seconds that the request adds to the chosen class."""
        return float(self.figures.work[self.index])

    @property
    def cost(self) -> float:
        """Expected US dollars of the request there."""
        return float(self.figures.cost[self.index])

    @property
    def finish(self) -> float:
        """Expected seconds until the answer."""
        return float(self.figures.finish[self.index])

    @property
    def at_most(self) -> float:
        """Seconds within which the answer is expected in all but a few of these cases."""
        return float(self.figures.at_most[self.index])

    def delay(self, growth: np.ndarray) -> float:
        """How much later the request is served once the work of each class has grown so, shape (classes, LEVELS)."""
        row = self.table.queue[self.index]
        return float(growth[row, : self.needs.level + 1].sum() / self.table.servers[self.index])

    def bounds(self, later: float) -> tuple[float, float]:
        """`finish` and `at_most`, if the request is served so much later."""
        later = max(later, -float(self.figures.wait[self.index]))
        return self.finish + later, self.at_most + later * float(self.table.residual[self.needs.level, self.index])

    @property
    def dearest(self) -> float:
        """The most US dollars that it may cost there, which its tenant's budget has to bear."""
        return float(dearest(self.table, self.needs, self.figures.cost)[self.index])

    @property
    def runs(self) -> int:
        """How many runs its own budget bears where tokens are paid for, each at the most it may cost; 0: any number.

        A run that an endpoint broke off is billed, too.
        """
        table, budget = self.table, self.needs.budget
        if budget is None or table.metered is None:
            return 0
        paid = open_to(table, self.needs, self.figures) & table.metered.any(axis=0)
        most = dearest(table, self.needs, self.figures.cost)[paid].max(initial=0.0)
        return max(int(min(budget / most, _ANY)), 1) if most else 0

    @property
    def device_dollars(self) -> float:
        """Price of its device time and tokens alone, without loads and shadow prices."""
        metered = self.table.metered
        tokens = 0.0 if metered is None else float(metered_cost(metered, self.needs)[self.index])
        return self.work * float(self.table.dollars[self.index]) + tokens

    def variants(self) -> dict[str, str]:
        """The variant for each hardware class that the job may run on: the cheapest one in that class."""
        table = self.table
        best: dict[str, str] = {}
        for i in _by_cost(self.figures, open_to(table, self.needs, self.figures)):
            best.setdefault(table.candidates[i].hardware_class, table.candidates[i].variant_name)
        best[self.candidate.hardware_class] = self.candidate.variant_name
        return dict(sorted(best.items()))


def choose(table: CandidateTable, needs: Needs, work: np.ndarray, *, seed: int) -> Placement:
    """Choose a hardware class and a variant, or hold the request until a queue is back within its horizon.

    A queue's horizon (`cost.horizon`) counts the work served before the request. Latency-critical requests are
    bound at once if they are in time, and refused if not; they are held only for a tenant over its fair share.

    Args:
        table: the model's candidates under the request's constraints.
        needs: the request's needs.
        work: device seconds in each class of the candidate table, shape (classes, LEVELS).
        seed: breaks ties; the same seed always gives the same choice.

    Raises:
        UnplaceableError: nothing in this fleet can ever run it; carries each candidate's reason.
        InvalidRequestError: every candidate costs more than its budget.
        NoDeviceError: no candidate has a live device.
        OverloadedError: it cannot be in time now, but could with shorter queues; or every candidate costs more than its
            tenant may still spend today.
    """
    equals = weigh(table, needs, work)
    return equals[pick(equals, seed)]


def pick(equals: Sequence[Placement], seed: int) -> int:
    """The position of the earlier of two placements picked at random. Deterministic in `seed`."""
    first, second = seed % len(equals), (seed // len(equals)) % len(equals)
    if first == second:
        return first
    return min(first, second, key=lambda n: (equals[n].finish, equals[n].cost, equals[n].index))


def tolerance(equals: Sequence[Placement]) -> float:
    """Change of the work ahead, in device seconds, that does not affect the decision for these placements.

    It is one batch per device, because rows that share a batch finish together, or the backlog if that is less; for a
    request with a single candidate to choose at least `SLACK`. None where requests leave the plan: each leaves only for
    where there is next to no work.
    """
    first = equals[0]
    if first.leaves:
        return 0.0
    table, needs = first.table, first.needs
    alike = np.minimum(full_batch(table, needs), first.figures.wait)
    if len(equals) == 1 and not first.held:
        left = math.inf if needs.deadline is None else needs.deadline
        alike = np.maximum(alike, SLACK * np.minimum(horizon(table, needs), left))
    return float((alike * table.servers)[[one.index for one in equals]].min())


@dataclass(frozen=True, slots=True, eq=False)
class Weighed:
    """The candidates of a request: their figures, and which of them may be chosen, as columns."""

    table: CandidateTable
    needs: Needs
    work: np.ndarray
    """As in `choose`."""
    figures: EstimateColumns
    eligible: np.ndarray
    """Those with a live device that are within the budget."""
    unreserved: np.ndarray
    """Those of them that are not kept for another service; all, if there are none."""
    within_horizon: np.ndarray


def weighed_for(table: CandidateTable, needs: Needs, work: np.ndarray) -> Weighed:
    """The candidates of a request; the arguments are those of `choose`."""
    figures = estimate_figures(table, needs, work[:, : needs.level + 1].sum(axis=1))
    eligible = open_to(table, needs, figures)
    unreserved = prefer(~reserved_and_busy(table, work), eligible) if any_true(table.reserved) else eligible
    return Weighed(table, needs, work, figures, eligible, unreserved, figures.wait <= horizon(table, needs))


def weigh(table: CandidateTable, needs: Needs, work: np.ndarray) -> list[Placement]:
    """The placements that are equally good for every request with these needs. Raises what `choose` raises."""
    if not table.candidates:
        raise _unplaceable(table)
    weighed = weighed_for(table, needs, work)
    _check_open(weighed)
    route = route_by_plan(weighed)
    if route.among is not None:
        weighed = replace(weighed, eligible=route.among, unreserved=route.among)
    lateness = 1.0 if route.among is None or (table.guide is not None and table.guide.scarce) else LATENESS_REFUSED
    equals, why = _contenders(weighed, lateness)
    figures = held = weighed.figures
    within_horizon = weighed.within_horizon
    if not all(within_horizon[i] for i in equals):  # held jobs are released in full batches
        in_full_batches = replace(needs, expected_batch=int(table.limit.max()))
        held = replace(figures, work=estimate_figures(table, in_full_batches, np.zeros(len(table.classes))).work)

    def reason(i: int) -> str:
        stale = "from queues.yaml only, the fleet snapshot is stale: " if table.stale else ""
        if not within_horizon[i]:
            return stale + route.note + _held_reason(table, needs, figures, i)
        return stale + route.note + why(i) + _saving(needs, figures, i)

    return [
        Placement(table, needs, figures if within_horizon[i] else held, i, reason, not within_horizon[i], route.leaves)
        for i in equals
    ]


def _saving(needs: Needs, figures: EstimateColumns, index: int) -> str:
    """What a prefix of the prompt that was read before is worth there."""
    prefix, saved = needs.prefix, figures.saved[index]
    if prefix is None or not saved:
        return ""
    return f"; {read_before(needs, prefix):.0f} tokens of the prompt were read there before: {saved:.3g} s less"


def _held_reason(table: CandidateTable, needs: Needs, figures: EstimateColumns, index: int) -> str:
    wait, most = figures.wait[index], horizon(table, needs)[index]
    why = "every queue that could take it is past its horizon"
    if needs.work_limit is not None:
        why = "its tenant is over its fair share"
    return f"held: {why}; {_name(table, index)} has {wait:.3g} s of work ahead (limit {most:.3g})"


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """The candidates that the plan leaves to choose `among`; None if it has no say. `note` begins the reason.

    `leaves` if they are not of the preferred class.
    """

    among: np.ndarray | None
    note: str = ""
    leaves: bool = False


def route_by_plan(weighed: Weighed) -> Route:
    """What the plan says about a request: to use the preferred class, or another one that surely saves it.

    It leaves the preferred class only if it is surely late there. Neither a class that has no devices yet nor a guess
    makes a request late that another class could take: then there is no plan for it. But rows that join a running batch
    slow down all of it: they go only where they are surely in time, or to classes that the plan does not use. A plan
    may give a reserved class to other services: it has played what that costs.
    """
    table, needs, figures = weighed.table, weighed.needs, weighed.figures
    guide = table.guide
    if guide is None:
        return Route(None, f"no plan: {table.unplanned}; " if table.unplanned else "")
    planned = weighed.eligible & guide.preferred
    if not any_true(planned):
        return Route(None, f"no plan: {guide.hardware_class} cannot take it now; ")
    deadline = needs.deadline
    finish = (figures.finish - table.blocking[needs.level])[planned]
    note = f"planned, {guide.in_time:.0%} in time: " if round(guide.in_time, 2) < 1 else "planned: "
    if deadline is None or any_true(finish <= deadline):
        return Route(planned, note)
    if guide.guessed:
        return Route(None, f"no plan: a guess, and {guide.hardware_class} would take {finish.min():.3g} s; ")
    harmless = weighed.unreserved & (blocks_for(table, needs) <= guide.spill)
    if not any_true(planned & guide.serve):
        note = f"no plan: {guide.hardware_class} has no device yet; "
        if table.billed is None:
            return Route(None, note)
        unused = weighed.unreserved & guide.serve & (guide.spill <= 0)  # classes with devices that serve no plan
        return Route(planned | unused | (harmless & (figures.at_most <= deadline)), note, leaves=True)
    safe = harmless & _surely_in_time(weighed)
    if not any_true(safe):
        return Route(planned, note)
    return Route(safe, f"left the plan: {guide.hardware_class} would take {finish.min():.3g} s; ", leaves=True)


def _surely_in_time(weighed: Weighed) -> np.ndarray:
    """Candidates that are sure to answer well within the deadline, and have hardly any work of its level or above."""
    table, needs, figures = weighed.table, weighed.needs, weighed.figures
    assert needs.deadline is not None
    ahead = weighed.work[:, : needs.level + 1].sum(axis=1)[table.queue] / table.servers
    sure: np.ndarray = (figures.at_most <= SURELY * needs.deadline) & (ahead <= HALF_BUSY * full_batch(table, needs))
    return sure


def reserved_and_busy(table: CandidateTable, work: np.ndarray) -> np.ndarray:
    """Which candidates are reserved for another service and busy; `work` as in `choose`."""
    total = work.sum(axis=1)[table.queue] / table.servers
    kept: np.ndarray = table.reserved & (total > RESERVED_SHARE * table.horizon)
    return kept


def seed_of(job: str) -> int:
    """The seed of a job's placement."""
    return crc32(job.encode())


def _check_open(weighed: Weighed) -> None:
    """Refuse a request to which no candidate is open. Raises as `choose` does."""
    table, needs = weighed.table, weighed.needs
    if any_true(weighed.eligible):
        return
    if not any_true(table.live):
        absent = [Refusal(c.hardware_class, c.variant_name, c.absent, ever=False) for c in table.candidates]
        raise _no_device(table, [*absent, *table.refusals])
    raise _unaffordable(table, needs, float(dearest(table, needs, weighed.figures.cost)[table.live].min()))


def open_to(table: CandidateTable, needs: Needs, figures: EstimateColumns) -> np.ndarray:
    """Which candidates have a live device and are within the budget, if any."""
    if needs.budget is None and needs.allowance is None:
        return table.live
    affordable: np.ndarray = table.live & (dearest(table, needs, figures.cost) <= needs.affordable)
    return affordable


def _unaffordable(table: CandidateTable, needs: Needs, least: float) -> InvalidRequestError | OverloadedError:
    """InvalidRequestError if the request's own budget is too small, else OverloadedError until the tenant's resets."""
    allowance = needs.allowance
    if needs.budget is not None and (allowance is None or needs.budget < least):
        return InvalidRequestError(
            f"budget: expected at least {least:.6g} USD for {table.model.id}, got {needs.budget:g}",
            field="budget",
            least=least,
        )
    assert allowance is not None
    return OverloadedError(
        f"the tenant {allowance.tenant!r} has {max(allowance.left, 0.0):.6g} of {allowance.usd_per_day:g} USD left for "
        f"today (UTC), {table.model.id} costs at least {least:.6g}",
        retry_after=allowance.renewed_in,
        tenant=allowance.tenant,
        left=allowance.left,
        least=least,
    )


def _contenders(weighed: Weighed, lateness: float) -> tuple[Sequence[int], Callable[[int], str]]:
    """The candidates to pick from, and the reason for each. Those within their horizon are preferred.

    A busy reserved class is excluded even if the request will be late elsewhere: that would make two requests late. A
    request is refused if it is expected after `lateness` times its deadline.
    """
    table, needs, figures = weighed.table, weighed.needs, weighed.figures
    eligible, unreserved, within_horizon = weighed.eligible, weighed.unreserved, weighed.within_horizon
    deadline = needs.deadline
    if deadline is None:
        chosen = _by_cost(figures, prefer(within_horizon, unreserved))[:1]
        return (
            chosen,
            lambda i: (
                "cheapest; no deadline" + _cheaper_rejected(table, figures, unreserved & ~within_horizon, math.inf, i)
            ),
        )
    meets = figures.at_most <= deadline
    sure = unreserved & meets
    if any_true(sure):
        return (
            _cheapest(table, needs, figures, prefer(within_horizon, sure)),
            lambda i: (
                f"cheapest that meets {deadline:g} s ({_bounds(figures, i)})"
                + _cheaper_rejected(table, figures, (eligible & ~meets) | (sure & ~within_horizon), deadline, i)
            ),
        )
    possible = unreserved & (_with_starts(table, figures) - table.blocking[needs.level] <= lateness * deadline)
    pool = prefer(within_horizon & (figures.finish <= deadline), prefer(possible, unreserved))
    earliest = _earliest(figures, pool)
    finish = float(figures.finish[earliest])
    if possible[earliest]:
        return (
            [earliest],
            lambda i: (
                f"earliest ({_bounds(figures, i)}); nothing is sure to meet {deadline:g} s"
                + _helped(table, figures, deadline, i)
            ),
        )
    in_time_if_idle = eligible & (figures.finish - figures.wait <= deadline)
    if any_true(in_time_if_idle):
        late = float(figures.finish[prefer(unreserved, in_time_if_idle)].min()) - deadline
        raise _too_late(table, earliest, finish, deadline, late)
    own = np.array([candidate.hardware.reserve_for == needs.constraints.service for candidate in table.candidates])
    earliest = _earliest(figures, prefer(own, unreserved))
    return [earliest], lambda i: f"earliest ({_bounds(figures, i)}); no idle device would meet {deadline:g} s"


def _too_late(table: CandidateTable, earliest: int, finish: float, deadline: float, late: float) -> OverloadedError:
    """The refusal of a request that would be answered in `finish` seconds at the earliest, `late` seconds too late."""
    planned = f"; the plan has {table.guide.in_time:.0%} of these in time" if table.guide is not None else ""
    return OverloadedError(
        f"expected in {finish:.3g} s at the earliest ({_name(table, earliest)}), the deadline is {deadline:g} s"
        + planned,
        retry_after=max(late, 0.0),
    )


def _with_starts(table: CandidateTable, figures: EstimateColumns) -> np.ndarray:
    """Seconds until each candidate's answer is expected if the devices that its class starts share the work ahead."""
    shared = (figures.wait * table.servers + table.coming * table.start) / (table.servers + table.coming)
    finish: np.ndarray = figures.finish - np.maximum(figures.wait - shared, 0.0)
    return finish


def _earliest(figures: EstimateColumns, among: np.ndarray) -> int:
    """The first of `among` to finish; the cheaper one on a tie."""
    found: list[int] = among.nonzero()[0].tolist()
    return min(found, key=lambda i: (figures.finish[i], figures.cost[i], i))


def _cheapest(table: CandidateTable, needs: Needs, figures: EstimateColumns, sure: np.ndarray) -> list[int]:
    """The candidates in `sure` within `NEAR` of the cheapest; only warm ones if one of them costs little more.

    A price that another fleet offers errs as its times do, and depends on the batches that it has now: of the fleets
    that might be the cheapest, the one that is earlier is as good.
    """
    cost = np.where(sure, figures.cost, np.inf)
    cheapest = cost.argmin()
    doubt = min(max(WARM_PREFERENCE, table.residual[needs.level, cheapest]), UNSURE)
    warm = (table.warm > 0) & (cost <= doubt * cost[cheapest])
    if any_true(warm):
        cost = np.where(warm, cost, np.inf)
        cheapest = cost.argmin()
    near = np.full(len(cost), NEAR)
    if table.offered is not None and table.offered[cheapest]:
        near[table.offered] = max(NEAR, min(table.residual[needs.level, cheapest], UNSURE))
    equals: list[int] = (cost <= near * cost[cheapest]).nonzero()[0].tolist()
    return equals


def prefer(within_horizon: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """The candidates in both `pool` and `within_horizon`; all of `pool` if there are none."""
    open_now: np.ndarray = pool & within_horizon
    return open_now if any_true(open_now) else pool


def _bounds(figures: EstimateColumns, index: int) -> str:
    """When the answer comes: a mean, and what all but a few keep within."""
    return f"expected in {figures.finish[index]:.3g} s, at most {figures.at_most[index]:.3g} s"


def _helped(table: CandidateTable, figures: EstimateColumns, deadline: float, index: int) -> str:
    """By which devices a request that would be late is in time."""
    finish = _with_starts(table, figures)[index]
    if figures.finish[index] <= deadline or finish > deadline:
        return ""
    name = table.candidates[index].hardware_class
    return f", but {table.coming[index]:g} more of {name} start: expected in {finish:.3g} s with them"


def _cheaper_rejected(
    table: CandidateTable, figures: EstimateColumns, among: np.ndarray, deadline: float, index: int
) -> str:
    """The cheaper candidate in `among`, if any, and why it was not taken: too late, or past its horizon."""
    if not any_true(among):
        return ""
    cheapest = int(np.where(among, figures.cost, np.inf).argmin())
    if figures.cost[cheapest] >= figures.cost[index]:
        return ""
    at_most, wait = figures.at_most[cheapest], figures.wait[cheapest]
    why = f"may take {at_most:.3g} s" if at_most > deadline else f"past its horizon ({wait:.3g} s of work)"
    return f"; {_name(table, cheapest)} is cheaper and {why}"


def _by_cost(figures: EstimateColumns, among: np.ndarray) -> list[int]:
    """Candidates in `among`, cheapest first; ties by finish, then by row in the candidate table."""
    return sorted(among.nonzero()[0].tolist(), key=lambda i: (figures.cost[i], figures.finish[i], i))


def _unplaceable(table: CandidateTable) -> InvalidRequestError | UnplaceableError | NoDeviceError:
    refusals: Sequence[Refusal] = table.refusals
    lines = _lines(refusals)
    asked = sorted({name for refusal in refusals for name in refusal.asked})
    if asked and all(r.ever for r in refusals):
        field = f"inputs.{table.model.inputs[0].name}"
        text = f"{field}: expected what some variant honours, got {', '.join(asked)}: {lines}"
        return InvalidRequestError(text, field=field, unsupported=True, asked=asked)
    if all(r.ever for r in refusals):
        return UnplaceableError(f"no device can run {table.model.id}: {lines}", refusals=_details(refusals))
    return _no_device(table, refusals)


def _no_device(table: CandidateTable, refusals: Sequence[Refusal]) -> NoDeviceError:
    """The error while no device can run the model; its text has the reasons that may change, and its details all."""
    lines = _lines([one for one in refusals if not one.ever])
    message = f"no device can run {table.model.id} now: {lines}"
    return NoDeviceError(message, refusals=_details(refusals), retry_after=RETRY_AFTER)


def _lines(refusals: Iterable[Refusal]) -> str:
    """The reasons, each once for the variants of a class."""
    alike: dict[tuple[str, str], list[str]] = {}
    for one in refusals:
        alike.setdefault((one.hardware_class, one.reason), []).append(one.variant)
    return "; ".join(f"{name}/{', '.join(variants)}: {why}" for (name, why), variants in alike.items())


def _details(refusals: Iterable[Refusal]) -> list[dict[str, str]]:
    return [{"hardware_class": one.hardware_class, "variant": one.variant, "reason": one.reason} for one in refusals]


def _name(table: CandidateTable, index: int) -> str:
    candidate = table.candidates[index]
    return f"{candidate.hardware_class}/{candidate.variant_name}"

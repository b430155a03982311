"""Chooses where a request runs: the cheapest candidate that meets its deadline, and says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from router.board import Board, lay_out
from router.classify import Candidate, Needs, Refusal
from router.cost import Estimate, Figures, reckon
from router.fleet import Backlog, FleetSnapshot
from tasks.catalogue import Model
from tasks.profiles import ProfileBook
from tasks.topology import Topology
from taxiway.errors import InvalidRequestError, NoDeviceError, OverloadedError, UnplaceableError

RETRY_AFTER = 5.0
"""Seconds after which a fleet without the right device is worth asking again: a worker's start, about."""

NEAR = 1.10
"""Candidates up to this multiple of the cheapest count as equally cheap (DESIGN §7)."""

WARM_PREFERENCE = 1.15
"""A warm candidate is taken over a cold one up to this multiple of its cost (DESIGN §7)."""

RESERVED_SHARE = 0.25
"""A reserved class takes other services' work while less than this share of its horizon waits there."""


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate with its figures, as it stood in the choice. `warning` says how little its profile rests on."""

    candidate: Candidate
    estimate: Estimate
    warm: bool
    live: bool
    warning: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where a request runs, and why. What was not chosen is worked out when somebody asks.

    `index` is the chosen candidate's place on the board, `level` the queue's priority level, 0 first.
    """

    board: Board
    needs: Needs
    figures: Figures
    index: int
    reason: str

    @property
    def level(self) -> int:
        """The queue's priority level, 0 first."""
        return self.needs.level

    @property
    def candidate(self) -> Candidate:
        """The chosen hardware class and variant."""
        return self.board.candidates[self.index]

    @property
    def work(self) -> float:
        """Device seconds that the request adds to the chosen class."""
        return float(self.figures.work[self.index])

    @property
    def cost(self) -> float:
        """US dollars that the request is to cost there."""
        return float(self.figures.cost[self.index])

    @property
    def chosen(self) -> Option:
        """The choice with its figures."""
        return self._option(self.index)

    @property
    def options(self) -> tuple[Option, ...]:
        """All that could have been chosen, cheapest first. Every other pair of class and variant is in `refusals`."""
        return tuple(self._option(i) for i in _by_cost(self.board, self.figures, _open(self)))

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Every class and variant that could not be chosen, with its reason."""
        board, cost, most = self.board, self.figures.cost, self.needs.affordable
        absent = [i for i in range(len(board.candidates)) if not board.live[i]]
        dear = [i for i in range(len(board.candidates)) if i not in absent and not self._within_budget(i)]
        return (
            *board.refusals,
            *(_refused(board, i, "no device of the class is live") for i in absent),
            *(_refused(board, i, f"costs {cost[i]:.3g} USD, over the budget of {most:g}") for i in dear),
        )

    def variants(self) -> dict[str, str]:
        """The variant for each hardware class that the job may run on: the cheapest one that the class has."""
        board = self.board
        best: dict[str, str] = {}
        for i in _by_cost(board, self.figures, _open(self)):
            best.setdefault(board.candidates[i].hardware_class, board.candidates[i].variant_name)
        best[self.candidate.hardware_class] = self.candidate.variant_name
        return dict(sorted(best.items()))

    def _within_budget(self, index: int) -> bool:
        return bool(self.figures.cost[index] <= self.needs.affordable)

    def _option(self, index: int) -> Option:
        board = self.board
        return Option(
            board.candidates[index],
            self.figures.at(index),
            warm=bool(board.warm[index] > 0),
            live=bool(board.live[index]),
            warning=board.warnings[index],
        )


def place(
    model: Model,
    needs: Needs,
    topology: Topology,
    fleet: FleetSnapshot,
    book: ProfileBook | None = None,
    *,
    seed: int = 0,
) -> Placement:
    """Choose for one request: `lay_out` and `choose` in one call. Raises what `choose` raises."""
    board = lay_out(model, needs.constraints, topology, fleet, book or ProfileBook())
    return choose(board, needs, Backlog(board.classes, {} if fleet.stale else fleet.work).seconds, seed=seed)


def choose(board: Board, needs: Needs, work: np.ndarray, *, seed: int) -> Placement:
    """Choose a hardware class and a variant.

    Args:
        board: the model's candidates under the request's constraints.
        needs: the request's.
        work: device seconds in each class of the board, shape (classes, LEVELS).
        seed: decides between equals; the same seed always gives the same choice.

    Raises:
        UnplaceableError: nothing in this fleet can ever run it; it has each candidate's reason.
        InvalidRequestError: everything that could run it costs more than its budget.
        NoDeviceError: what could run it has no live device.
        OverloadedError: it cannot be done by its deadline, and could be when queues are shorter; or everything that
            could run it costs more than its tenant may still spend today.
    """
    if not board.candidates:
        raise _unplaceable(board)
    figures = reckon(board, needs, work[:, : needs.level + 1].sum(axis=1))
    able = _able(board, needs, figures)
    free = able & ~kept_back(board, work)
    index, reason = _choose(board, needs, figures, able=able, free=free, seed=seed)
    if board.stale:
        reason = f"by queues.yaml alone, for the fleet's state could not be read: {reason}"
    return Placement(board, needs, figures, index, reason)


def kept_back(board: Board, work: np.ndarray) -> np.ndarray:
    """Which candidates are reserved for another service and busy with it; `work` as in `choose`."""
    total = work.sum(axis=1)[board.queue] / board.servers
    kept: np.ndarray = board.reserved & (total > RESERVED_SHARE * board.horizon)
    return kept


def seed_of(job: str) -> int:
    """The seed of a job's placement."""
    return crc32(job.encode())


def _able(board: Board, needs: Needs, figures: Figures) -> np.ndarray:
    """Which candidates have a live device and are within the budget."""
    present = board.live
    if not present.any():
        classes = ", ".join(sorted({c.hardware_class for c in board.candidates}))
        raise NoDeviceError(
            f"{board.model.id} runs on {classes}, and no device of these is live", retry_after=RETRY_AFTER
        )
    if needs.budget is None and needs.allowance is None:
        return present
    able: np.ndarray = present & (figures.cost <= needs.affordable)
    if not able.any():
        raise _unaffordable(board, needs, float(figures.cost[present].min()))
    return able


def _unaffordable(board: Board, needs: Needs, least: float) -> InvalidRequestError | OverloadedError:
    """The request's fault where its own budget is too small; else its tenant has to wait for another day."""
    allowance = needs.allowance
    if needs.budget is not None and (allowance is None or needs.budget < least):
        return InvalidRequestError(
            f"budget: expected at least {least:.6g} USD for {board.model.id}, got {needs.budget:g}",
            field="budget",
            least=least,
        )
    assert allowance is not None
    return OverloadedError(
        f"the tenant {allowance.tenant!r} has {max(allowance.left, 0.0):.6g} of {allowance.usd_per_day:g} USD left for "
        f"today (UTC), {board.model.id} costs at least {least:.6g}",
        retry_after=allowance.renewed_in,
        tenant=allowance.tenant,
        left=allowance.left,
        least=least,
    )


def _choose(
    board: Board, needs: Needs, figures: Figures, *, able: np.ndarray, free: np.ndarray, seed: int
) -> tuple[int, str]:
    deadline = needs.deadline
    if deadline is None:
        pool = free if free.any() else able
        return _by_cost(board, figures, pool)[0], "cheapest; no deadline"
    meets = figures.guaranteed <= deadline
    sure = free & meets
    if not sure.any():
        sure = able & meets
    if sure.any():
        index = _cheapest(board, figures, sure, seed)
        reason = f"cheapest that meets {deadline:g} s (guaranteed in {figures.guaranteed[index]:.3g} s)"
        return index, reason + _dismissed(board, figures, able & ~meets, index)
    unreserved = free if free.any() else able  # what would be late anyway takes nothing from whom a class is kept for
    earliest = min(np.flatnonzero(unreserved).tolist(), key=lambda i: (figures.finish[i], figures.cost[i], i))
    finish = float(figures.finish[earliest])
    if finish <= deadline:
        return earliest, f"earliest, expected in {finish:.3g} s; nothing is sure to meet {deadline:g} s"
    in_time_if_idle = able & (figures.finish - figures.wait <= deadline)
    if in_time_if_idle.any():
        raise OverloadedError(
            f"expected in {finish:.3g} s at the earliest ({_name(board, earliest)}), the deadline is {deadline:g} s",
            retry_after=float(figures.finish[in_time_if_idle].min()) - deadline,
        )
    return earliest, f"earliest; no idle device would meet {deadline:g} s ({finish:.3g} s expected)"


def _cheapest(board: Board, figures: Figures, sure: np.ndarray, seed: int) -> int:
    """The cheapest of `sure`; among those about as cheap, a warm one, else the earlier of two at random."""
    cost = np.where(sure, figures.cost, np.inf)
    least = cost.min()
    warm = (board.warm > 0) & (cost <= WARM_PREFERENCE * least)
    if warm.any():
        cost = np.where(warm, cost, np.inf)
        least = cost.min()
    near = np.flatnonzero(cost <= NEAR * least).tolist()
    first, second = near[seed % len(near)], near[(seed // len(near)) % len(near)]
    return min(first, second, key=lambda i: (figures.finish[i], figures.cost[i], i))


def _dismissed(board: Board, figures: Figures, late: np.ndarray, index: int) -> str:
    """What would have been cheaper, and how long it would have taken."""
    if not late.any():
        return ""
    cheapest = int(np.where(late, figures.cost, np.inf).argmin())
    if figures.cost[cheapest] >= figures.cost[index]:
        return ""
    return f"; {_name(board, cheapest)} is cheaper and would take {figures.guaranteed[cheapest]:.3g} s"


def _open(placement: Placement) -> np.ndarray:
    affordable: np.ndarray = placement.board.live & (placement.figures.cost <= placement.needs.affordable)
    return affordable


def _by_cost(board: Board, figures: Figures, among: np.ndarray) -> list[int]:
    """Candidates of `among`, cheapest first; equal ones by finish, then as they stand on the board."""
    return sorted(np.flatnonzero(among).tolist(), key=lambda i: (figures.cost[i], figures.finish[i], i))


def _refused(board: Board, index: int, reason: str) -> Refusal:
    candidate = board.candidates[index]
    return Refusal(candidate.hardware_class, candidate.variant_name, reason, ever=False)


def _unplaceable(board: Board) -> UnplaceableError | NoDeviceError:
    refusals: Sequence[Refusal] = board.refusals
    table = [{"hardware_class": r.hardware_class, "variant": r.variant, "reason": r.reason} for r in refusals]
    lines = "; ".join(f"{r.hardware_class}/{r.variant}: {r.reason}" for r in refusals)
    message = f"no device can run {board.model.id}: {lines}"
    if all(r.ever for r in refusals):
        return UnplaceableError(message, refusals=table)
    return NoDeviceError(message, refusals=table, retry_after=RETRY_AFTER)


def _name(board: Board, index: int) -> str:
    candidate = board.candidates[index]
    return f"{candidate.hardware_class}/{candidate.variant_name}"

"""Whether a plan keeps what it promised: one that does not is dropped, and requests are placed one by one. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simulator.policies.policy import LIVE, Cell
from simulator.tuning.twin import starving

WORSE = 2.5
"""A period is worse than predicted from this many times the prediction.

Source: the trials, where 1.5 dropped plans in bursts, and placement by request then cost more than the plans did (drift
3.7 instead of 3.1, a private model's live attainment on the edge 73 % instead of 89 %)."""

PERIODS = 2
"""Periods in a row that are worse than predicted before a plan is dropped."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Requests of a cell that ended, and how many of them were late or refused."""

    ended: int = 0
    late: int = 0

    def with_one(self, *, timely: bool) -> Answers:
        """With one more request."""
        return Answers(self.ended + 1, self.late + (not timely))


def measured(usd_per_hour: float, answers: Mapping[Cell, Answers], penalties: Sequence[float]) -> float:
    """The score of a period in US dollars an hour, as `Twin.play` counts it: cost, and penalties for what was late."""
    score = usd_per_hour
    for service, penalty in enumerate(penalties):
        mine = [found for cell, found in answers.items() if cell[1] == service]
        ended = sum(found.ended for found in mine)
        score += penalty * sum(found.late for found in mine) / ended if ended else 0.0
    live = [found for cell, found in answers.items() if cell[1] == LIVE and found.ended]
    return score + sum(starving(1 - found.late / found.ended, penalties) for found in live)


@dataclass(frozen=True, slots=True)
class Trust:
    """How many periods in a row were worse than predicted."""

    worse: int = 0

    def after(self, score: float, predicted: float) -> Trust:
        """After a period with this score."""
        return Trust(self.worse + 1 if score > WORSE * predicted else 0)

    @property
    def lost(self) -> bool:
        """Whether the plan shall be dropped."""
        return self.worse >= PERIODS


class Judged:
    """What is counted of a period: when it began, the US dollars that had been spent by then, and answers since."""

    def __init__(self, since: float = 0.0, spent: float = 0.0) -> None:
        self.since = since
        self._spent = spent
        self._answers: dict[Cell, Answers] = {}

    def note(self, cell: Cell, *, timely: bool) -> None:
        """A request of a cell has ended."""
        self._answers[cell] = self._answers.get(cell, Answers()).with_one(timely=timely)

    def score(self, now: float, spent: float, penalties: Sequence[float]) -> float:
        """The period's score until now, in US dollars an hour."""
        return measured((spent - self._spent) / (now - self.since) * 3600, self._answers, penalties)

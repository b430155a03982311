"""The jobs that producers submit, generated from a seed. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job to submit.

    `interfaces` are tried in order; with `twice` it is submitted at two of them at the same time, with `cancel` it is
    cancelled at once. `key` is its idempotency key; `deadline` is in seconds, 0 for none.
    """

    number: int
    interfaces: Sequence[str]
    model: str
    deadline: float = 0.0
    key: str = ""
    twice: bool = False
    cancel: bool = False


MODELS = {"tally": 60, "echo": 36, "garbage": 3, "leak": 1}
"""Models with their share of jobs in percent; the models of `tests.chaos.plan.HARMFUL` are requested in addition."""

_KEYED, _TWICE, _CANCELLED, _WITH_DEADLINE = 0.5, 0.2, 0.03, 0.15


def generate_jobs(seed: int, jobs: int, interfaces: Sequence[str]) -> Iterator[JobSpec]:
    """The jobs of a run, numbered from 1. Those with a key use no interface of plain Celery, which takes none."""
    random = Random(seed)
    for number in range(1, jobs + 1):
        keyed = random.random() < _KEYED
        own = [interface for interface in interfaces if interface != "celery"] if keyed else interfaces
        yield JobSpec(
            number=number,
            interfaces=random.sample(own, len(own)),
            model=random.choices(list(MODELS), list(MODELS.values()))[0],
            deadline=random.choice((0.2, 1.0, 5.0)) if random.random() < _WITH_DEADLINE else 0.0,
            key=f"{seed}-{number}" if keyed else "",
            twice=keyed and random.random() < _TWICE,
            cancel=random.random() < _CANCELLED,
        )

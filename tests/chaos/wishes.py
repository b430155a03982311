"""What producers ask for: a list of jobs that a seed decides. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Wish:
    """One job. `doors` are tried in turn; `again` asks for it at two of them at once, `cancel` regrets it at once.

    `key` is its idempotency key; `deadline` is in seconds, 0 for none.
    """

    number: int
    doors: Sequence[str]
    model: str
    deadline: float = 0.0
    key: str = ""
    again: bool = False
    cancel: bool = False


MODELS = {"tally": 60, "echo": 36, "garbage": 3, "leak": 1}
"""Of a hundred jobs; `tests.chaos.plan.HARMFUL` are asked for beside them."""

_KEYED, _AGAIN, _CANCELLED, _DUE = 0.5, 0.2, 0.03, 0.15


def draw_wishes(seed: int, jobs: int, doors: Sequence[str]) -> Iterator[Wish]:
    """The jobs of a run, numbered from 1."""
    random = Random(seed)
    for number in range(1, jobs + 1):
        keyed = random.random() < _KEYED
        yield Wish(
            number=number,
            doors=random.sample(doors, len(doors)),
            model=random.choices(list(MODELS), list(MODELS.values()))[0],
            deadline=random.choice((0.2, 1.0, 5.0)) if random.random() < _DUE else 0.0,
            key=f"{seed}-{number}" if keyed else "",
            again=keyed and random.random() < _AGAIN,
            cancel=random.random() < _CANCELLED,
        )

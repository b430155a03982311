from dataclasses import dataclass, field

import pytest

from tasks.document import Size
from tasks.heartbeat import ANY
from tasks.models.model import Profile, Variant
from tasks.models.profiles import KnownProfile
from tests.builders import a_text_model
from workers.learned import LearnedTimes, Loaded
from workers.port import Item
from workers.runtimes.echo import EchoRuntime

VARIANT = Variant(runtime="echo", memory=Size(1), profiles={"cpu": Profile(1.0, 0.0)})
MODEL = a_text_model(fast=VARIANT)


@dataclass
class Row:
    """A row of size 1."""

    size: int = 1
    level: int = 0
    parameters: dict[str, object] = field(default_factory=dict)


class NoPipeline:
    """Prepares and runs nothing."""


def loaded(key: str = "sentiment:1/fast", *, base: float = 1.0, load: float = 2.0, seconds: float = 2.0) -> Loaded:
    known = KnownProfile(Profile(base=base, slope=0.0, load=load), 1.1, 1)
    return Loaded(key, MODEL, VARIANT, NoPipeline(), EchoRuntime(), known, seconds)  # type: ignore[arg-type]


def ran(times: LearnedTimes, one: Loaded, seconds: float, *, batches: int = 1) -> None:
    item: Item = Row()  # type: ignore[assignment]
    for _ in range(batches):
        times.observe(one, [item], [{}], rows=1, seconds=seconds)


def test_what_runs_tells_of_the_device_unless_it_is_too_short_for_that() -> None:
    times, long, short = LearnedTimes(), loaded(), loaded("echo:1/echo", base=1e-5)
    ran(times, short, 1.0)
    assert ANY not in times.reported([long, short])["pace"]
    ran(times, long, 3.0, batches=20)
    pace = times.reported([long, short])["pace"]
    assert pace[long.key] == 3.0
    assert pace[ANY] == pytest.approx(3.0, rel=0.1)


def test_jobs_that_took_longer_than_expected_widen_the_residual_of_their_level() -> None:
    times, one = LearnedTimes(), loaded()
    ran(times, one, 1.0, batches=60)
    for _ in range(60):
        times.judge(one.key, 0, expected=0.1, seconds=0.11)
    before = times.reported([one])["residual"]
    for _ in range(10):
        times.judge(one.key, 0, expected=0.1, seconds=0.8)
    after = times.reported([one])["residual"]
    assert before[one.key][0] < 1.4 and after[one.key][0] > 8
    assert after[one.key][1:] == before[one.key][1:]
    assert after[ANY][0] > 8

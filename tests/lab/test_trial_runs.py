"""The trials' runs, tables and targets."""

from pathlib import Path

import msgspec
import pytest

from lab.trials.__main__ import panels, table
from lab.trials.runs import Run, Source, Task, play
from lab.trials.targets import targets
from lab.trials.trial import FLEETS


def trial_run(policy: str, seed: int, score: float, live: float = 1.0, changes: int = 0, trial: str = "steady") -> Run:
    return Run(
        trial=trial,
        seed=seed,
        policy=policy,
        attainment={"live": live, "standard": 1.0, "bulk": None},
        cost_usd=score / 2,
        score=score,
        live_by_model={"chat": live, "big": 1.0},
        changes={"chat": changes, "big": 0},
    )


OPPONENTS_RUNS = [
    trial_run("tuned-split", 7, 2.0, live=0.80),
    trial_run("pinned", 7, 4.0),
    trial_run("tuned-split", 8, 9.0),
    trial_run("pinned", 8, 4.0, live=0.95),
]


def test_the_score_is_held_against_the_better_opponent_of_each_seed() -> None:
    ours = [trial_run("taxiway", 7, 2.4), trial_run("taxiway", 8, 3.3)]
    every = ours + OPPONENTS_RUNS
    cold, warm = ({one.target: one for one in targets("steady", every, warm=warm)} for warm in (False, True))
    at_most = "score at most 1.00 of the better of tuned-split and pinned"
    assert (cold[at_most].because, cold[at_most].holds) == ("0.95", True)
    assert not warm["score at most 0.85 of the better of tuned-split and pinned"].holds


@pytest.mark.parametrize(("live", "holds"), [(0.91, True), (0.78, True), (0.76, False)])
def test_no_model_may_be_served_worse_than_the_floor_and_the_better_opponent(live: float, holds: bool) -> None:
    ours = [trial_run("taxiway", 7, 2.0, live=live), trial_run("taxiway", 8, 4.0)]
    every = targets("steady", ours + OPPONENTS_RUNS, warm=False)
    (found,) = (target for target in every if target.target.startswith("each model"))
    assert found.holds == holds


def test_a_trial_is_played_and_shown_as_a_table_and_bars() -> None:
    runs = [play(Task(Source(), "edge", 7, policy)) for policy in ("static", "lp-bound")]
    runs.append(msgspec.structs.replace(runs[0], policy="taxiway", score=runs[0].score + 1))
    assert list(table("edge", runs).columns[0].cells) == ["static", "taxiway", "lp-bound"]
    assert [bar.name for bar in next(panels(runs)).bars] == ["static", "taxiway"]
    assert runs[0].live_by_model.keys() == runs[0].changes.keys() == {"sentiment", "sentiment.p", "image", "image.p"}


def test_a_trace_with_a_fleet_file_of_its_own_is_played_on_that_fleet(tmp_path: Path) -> None:
    mine = tmp_path / "7" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text((FLEETS / "edge.yaml").read_text().replace("edge.cpu:", "my.cpu:"))
    mine.with_suffix(".csv").write_text("arrival,model,size,deadline,priority,tenant\n0,image,40,2,,\n")
    workload = Source(tmp_path).workload("mine", 7)
    assert (workload.trace.models, "my.cpu" in workload.fleet.classes) == (("image",), True)

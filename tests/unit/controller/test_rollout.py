from collections import Counter
from dataclasses import dataclass, field, replace

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from controller.decide.rollout import (
    STILL,
    DeployedPart,
    JobFigures,
    Rollout,
    RolloutLimits,
    RolloutStep,
    Stage,
    advance,
    judge,
)
from controller.spec import FleetStatus

LIMITS = RolloutLimits(watch=5, timeout=60)
STAGES = (Stage(("a",), 0.5), Stage(("a",)), Stage(("b", "c")), Stage(("router",)))
NAMES = ("a", "b", "c", "router")
SLOW = 3
"""Looks until a new pod is ready."""


@dataclass
class World:
    """Deployments whose pods are replaced one by one while they are open; the operator forgets all but its status."""

    counts: dict[str, int]
    broken: set[str] = field(default_factory=set)
    wants: dict[str, str] = field(default_factory=lambda: dict.fromkeys(NAMES, "1"))
    pods: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    newest: dict[str, str] = field(default_factory=lambda: dict.fromkeys(NAMES, "1"))
    rollout: Rollout = field(default_factory=Rollout)
    now: float = 1.0

    def __post_init__(self) -> None:
        self.pods = {name: [("1", 0)] * count for name, count in self.counts.items()}

    def part(self, name: str) -> DeployedPart:
        pods, wants = self.pods[name], self.wants[name]
        mine = [born for template, born in pods if template == wants]
        ready = [born for born in mine if self.now >= born + SLOW and wants not in self.broken]
        have = Counter(template for template, _ in pods)
        runs = max(have, key=have.__getitem__, default=self.newest[name])
        return DeployedPart(wants, runs, self.counts[name], len(mine), len(ready), len(pods) - len(mine))

    def look(self, harm: str = "") -> RolloutStep:
        """One look of the operator and what Kubernetes does until the next."""
        known = msgspec.json.decode(msgspec.json.encode(FleetStatus(rollout=self.rollout)), type=FleetStatus).rollout
        step = advance(known, STAGES, {name: self.part(name) for name in NAMES}, harm, self.now, LIMITS)
        self.rollout = step.rollout
        for name in step.restore:
            self.wants[name] = (step.rollout.before or {})[name]
        for name in step.open:
            self._roll(name)
        self.now += 1
        return step

    def _roll(self, name: str) -> None:
        part, self.newest[name] = self.part(name), self.wants[name]
        old = next((index for index, (template, _) in enumerate(self.pods[name]) if template != self.wants[name]), None)
        if old is not None and part.ready == part.updated:
            self.pods[name][old] = (self.wants[name], int(self.now))

    def change(self, template: str) -> None:
        self.wants = dict.fromkeys(NAMES, template)

    def settle(self, looks: int = 1000) -> list[RolloutStep]:
        """Look until nothing goes on any more."""
        steps = [self.look()]
        while steps[-1].rollout.phase != "idle":
            steps.append(self.look())
            assert len(steps) < looks
        return steps


counts = st.fixed_dictionaries({name: st.integers(0, 5) for name in NAMES})


@given(counts=counts)
def test_a_change_reaches_all_pods_one_stage_after_the_other_and_each_is_watched(counts: dict[str, int]) -> None:
    world = World(counts)
    world.change("2")
    steps = world.settle()
    assert all(template == "2" for pods in world.pods.values() for template, _ in pods)
    stages = [step.rollout.stage for step in steps[:-1]]
    assert stages == sorted(stages)
    for step in steps:
        if step.rollout.phase == "rolling":
            assert step.open <= set(STAGES[step.rollout.stage].parts)
        else:
            assert not step.open
    served = {index for index, stage in enumerate(STAGES) if any(counts[name] for name in stage.parts)}
    watched = {step.rollout.stage for step in steps if step.rollout.phase == "watching"}
    assert served - {1} <= watched <= served  # a canary of one pod is a share already


@given(counts=counts, at=st.integers(1, 60))
def test_harm_at_any_time_brings_back_what_was_in_every_part(counts: dict[str, int], at: int) -> None:
    world = World(counts)
    world.change("2")
    for _ in range(at):
        world.look()
    harmed = world.rollout.phase in ("rolling", "watching")
    world.look("jobs fail")
    world.settle()
    expected = "1" if harmed else "2"
    assert set(world.wants.values()) == {expected}
    assert all(template == expected for pods in world.pods.values() for template, _ in pods)
    assert world.rollout.why == ("rolled back: jobs fail" if harmed else "done")


@given(counts=counts.filter(lambda found: any(found.values())))
def test_pods_that_never_get_ready_are_taken_back_after_their_time(counts: dict[str, int]) -> None:
    world = World(counts, broken={"2"})
    world.change("2")
    steps = world.settle()
    assert set(world.wants.values()) == {"1"}
    assert "not ready after 60 s" in world.rollout.why
    first = next(index for index, stage in enumerate(STAGES) if any(counts[name] for name in stage.parts))
    assert max(step.rollout.stage for step in steps) <= max(first, 1)


@given(counts=counts, at=st.integers(0, 60), again=st.integers(0, 60))
def test_a_change_in_the_middle_of_another_goes_through_all_stages(counts: dict[str, int], at: int, again: int) -> None:
    world = World(counts)
    world.change("2")
    for _ in range(at):
        world.look()
    world.change("3")
    for _ in range(again):
        world.look()
    world.settle()
    assert all(template == "3" for pods in world.pods.values() for template, _ in pods)
    assert set(world.wants.values()) == {"3"}


@given(counts=counts, harmful=st.lists(st.booleans(), max_size=80), changes=st.sets(st.integers(0, 80), max_size=4))
def test_whatever_happens_it_ends_and_every_part_has_one_template(
    counts: dict[str, int], harmful: list[bool], changes: set[int]
) -> None:
    world = World(counts)
    for index, harm in enumerate(harmful):
        if index in changes:
            world.change(str(index + 2))
        world.look("harm" if harm else "")
    world.settle()
    assert len(set(world.wants.values())) == 1
    for name in NAMES:
        assert {template for template, _ in world.pods[name]} <= {world.wants[name]}


def test_parts_that_never_had_pods_are_open_at_once_beside_any_stage() -> None:
    parts = {
        "a": DeployedPart("2", "1", 1, 0, 0, 1),
        "b": DeployedPart("2", ""),
        "router": DeployedPart("1", "1", 1, 1, 1),
    }
    step = advance(Rollout(), STAGES, parts, "", 1.0, LIMITS)
    assert step.open == {"b"}
    step = advance(step.rollout, STAGES, parts, "", 1.0 + STILL, LIMITS)
    assert step.open == {"a", "b"}


@given(order=st.permutations(NAMES), pause=st.integers(0, int(STILL) - 1))
def test_deployments_that_change_one_after_the_other_roll_together(order: list[str], pause: int) -> None:
    world = World(dict.fromkeys(NAMES, 2))
    for name in order:
        world.wants[name] = "2"
        for _ in range(pause):
            assert not world.look().open
    stages = [step.rollout.stage for step in world.settle() if step.rollout.phase == "rolling"]
    assert sorted(set(stages)) == [0, 1, 2, 3]
    assert stages == sorted(stages)


def test_new_pods_are_judged_once_they_have_done_enough() -> None:
    before = JobFigures(jobs=1000, failed=10, seconds=100)
    assert judge(before, JobFigures(19, 19, 100), LIMITS) == ""
    assert judge(before, JobFigures(100, 6, 10), LIMITS) == ""
    assert judge(before, JobFigures(100, 7, 10), LIMITS) == "7% of 100 jobs failed, 1% before"
    assert judge(before, JobFigures(100, 1, 25), LIMITS) == "jobs ran 0.25 s, 0.1 s before"
    assert judge(JobFigures(), JobFigures(100, 1, 2500), LIMITS) == ""
    assert judge(before, replace(before, seconds=200), LIMITS) == ""

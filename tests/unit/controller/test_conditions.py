"""The chart's files as data; tests/cluster renders and installs it."""

import re
from typing import Any

import pytest
import yaml

from broker.accounts import ACCOUNTS, valkey_accounts
from controller import spec
from controller.decide.rollout import JobFigures, Rollout, RolloutLimits
from tasks.settings import TREE

CHARTS = TREE / "charts"


@pytest.mark.parametrize("account", ["flower", "tuner"])
def test_flower_and_the_tuner_may_do_at_valkey_what_their_accounts_may(account: str) -> None:
    accounts = valkey_accounts([], dict.fromkeys(ACCOUNTS, "x"))
    [line] = [one for one in accounts.splitlines() if f"user {account} " in one]
    assert (CHARTS / "taxiway" / "files" / f"{account}.acl").read_text().split() == line.split()[4:]


def test_the_chart_has_the_images_of_others_that_compose_has() -> None:
    values = yaml.safe_load((CHARTS / "taxiway" / "values.yaml").read_text())
    pinned = set(re.findall(r"_IMAGE:-(\S+@sha256:\w+)", (TREE / "docker" / "compose.yaml").read_text()))
    assert {values["valkey"]["image"], values["nginx"]} <= pinned


SPEC = spec.FleetSpec(router="http://r", routers="router", selector="a=b", classes=("gpu", "cpu"))

FINE: dict[str, spec.ClassStatus | None] = {
    "gpu": spec.ClassStatus(wanted=2, replicas=2),
    "cpu": spec.ClassStatus(wanted=0),
}


@pytest.mark.parametrize(
    ("classes", "rollout", "routers", "answers", "expected"),
    [
        (FINE, Rollout(), 2, True, ("Serving", "AsDeclared", "Steady")),
        (FINE, Rollout(), 0, True, ("NoRouter", "AsDeclared", "Steady")),
        (FINE, Rollout(), 1, False, ("Serving", "RouterUnreachable", "Steady")),
        ({"gpu": None}, Rollout(), 1, True, ("Serving", "Missing", "Steady")),
        ({"gpu": spec.ClassStatus(wanted=2)}, Rollout(), 1, True, ("NoWorker", "AsDeclared", "Scaling")),
        ({**FINE, "cpu": spec.ClassStatus(wanted=1)}, Rollout(), 1, True, ("Serving", "AsDeclared", "Scaling")),
        (
            {"gpu": spec.ClassStatus(pools=(spec.PoolStatus(name="spot", phase="out"),))}, Rollout(), 1, True,
            ("Serving", "PoolOut", "Steady"),
        ),
        (FINE, Rollout(why="rolled back: gpu"), 1, True, ("Serving", "RolledBack", "Steady")),
        (FINE, Rollout("watching"), 1, True, ("Serving", "AsDeclared", "Watching")),
    ],
)  # fmt: skip
def test_conditions_say_why(
    classes: dict[str, spec.ClassStatus | None],
    rollout: Rollout,
    routers: int,
    answers: bool,
    expected: tuple[str, ...],
) -> None:
    found = list(spec.conditions(SPEC, rollout, classes, routers, answers=answers))
    assert tuple(one.reason for one in found) == expected
    ready, degraded, progressing = (one.status == "True" for one in found)
    assert (ready, degraded, progressing) == (
        expected[0] == "Serving", expected[1] != "AsDeclared", expected[2] != "Steady",
    )  # fmt: skip


def test_a_condition_keeps_its_time_while_its_status_stays() -> None:
    before = (spec.Condition(type="Ready", status="True", reason="a", message="", last_transition_time="then"),)
    same = spec.Condition(type="Ready", status="True", reason="b", message="")
    other = spec.Condition(type="Ready", status="False", reason="b", message="")
    assert spec.since([same], before, "now")[0].last_transition_time == "then"
    assert spec.since([other], before, "now")[0].last_transition_time == "now"


def template(image: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"labels": {"app": "a", **labels}}, "spec": {"image": image}}


def replica_set(image: str, revision: int, replicas: int) -> dict[str, Any]:
    owner = {"ownerReferences": [{"uid": "d"}], "annotations": {"deployment.kubernetes.io/revision": str(revision)}}
    status = {"replicas": replicas, "availableReplicas": replicas}
    return {"metadata": owner, "spec": {"template": template(image, **{"pod-template-hash": "x"})}, "status": status}


def test_a_deployment_is_described_by_the_templates_of_its_replica_sets() -> None:
    deployment = {"metadata": {"uid": "d"}, "spec": {"replicas": 3, "template": template("new")}}
    sets = spec.sets_of(deployment, [replica_set("new", 9, 1), replica_set("old", 10, 2), replica_set("first", 1, 0)])
    part = spec.part_of(deployment, sets)
    assert (part.wants, part.runs) == (spec.digest(template("new")), spec.digest(template("old")))
    assert (part.asked, part.updated, part.ready, part.old) == (3, 1, 1, 2)
    again = spec.sets_of(deployment, [replica_set("new", 11, 0), replica_set("old", 10, 2)])
    assert spec.part_of(deployment, again).runs == spec.digest(template("old"))
    none = spec.sets_of(deployment, [replica_set("new", 11, 0), replica_set("old", 10, 0)])
    assert spec.part_of(deployment, none).runs == spec.digest(template("new"))
    assert spec.part_of(deployment, {}).runs == ""
    assert spec.earlier_template(sets, part.runs) == template("old")
    assert spec.earlier_template(sets, "unknown") is None


def test_only_what_changed_pods_have_done_is_judged() -> None:
    done = {
        "gpu": {"outcomes": {"succeeded": 5, "failed": 4, "dead": 1, "expired": 7}, "latency": {"run": [1, 9, 3.5]}}
    }
    devices = [{"worker": f"gpu.cuda-0@{pod}", "hardware_class": "gpu", "done": done} for pod in ("a", "b")]
    assert spec.figures_of(devices, {"a"}) == {"gpu": JobFigures(10, 5, 3.5)}
    assert spec.figures_of(devices) == {"gpu": JobFigures(20, 10, 7.0)}
    assert spec.harm_of({}, spec.figures_of(devices), RolloutLimits()) == "gpu: 50% of 20 jobs failed, 0% before"
    assert spec.harm_of({}, {}, RolloutLimits()) == ""

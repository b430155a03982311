"""What counts as a notice that the machine is to be reclaimed, and how long it then stays."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.settings import TREE
from tasks.topology import Notice, TopologyError, parse_topology
from workers.drain import NoticeWatch, grace_of

NOW = 1_505_722_800.0  # 2017-09-18T08:20:00Z


@pytest.mark.cases("notice, text, grace")
def test_a_text_says_when_the_machine_goes(notice: dict[str, Any], text: str, grace: float | None) -> None:
    assert grace_of(text, Notice(**notice), NOW) == grace


def test_a_file_that_appears_is_a_notice(tmp_path: Path) -> None:
    flag = tmp_path / "reclaimed"
    watch = NoticeWatch(Notice(file=str(flag)), lambda grace: None)
    assert watch.look() is None
    flag.write_text("7")
    assert watch.look() == 7.0


def test_a_signal_is_a_notice_and_a_second_one_asks_to_leave_at_once() -> None:
    watch = NoticeWatch(Notice(grace=30), lambda grace: None)
    assert watch.look() is None
    watch.signal()
    assert watch.look() == 30.0
    watch.signal()
    assert watch.look() == 0.0


def class_with(notice: dict[str, Any]) -> str:
    hardware = {
        "device": "cpu",
        "runtimes": ["echo"],
        "max_batch": 1,
        "max_wait": 0,
        "price": {"usd_per_hour": 1},
        "notice": notice,
    }
    return yaml.safe_dump(
        {"hardware": {"cpu.spot": hardware}, "service": {"standard": {}}, "default_service": "standard"}
    )


def test_a_pattern_that_is_none_is_named_in_the_error() -> None:
    with pytest.raises(TopologyError, match=r"hardware\.cpu\.spot\.notice\.says: expected a regular expression"):
        parse_topology(class_with({"says": "("}))


def test_the_notices_of_clouds_in_the_documentation_are_right() -> None:
    page = (TREE / "docs" / "operations.md").read_text(encoding="utf-8")
    clouds = yaml.safe_load(page.split("```yaml\n# notices")[1].split("```")[0])
    assert set(clouds) == {"aws", "gcp", "azure"}
    for notice in clouds.values():
        assert parse_topology(class_with(notice)).hardware["cpu.spot"].notice.url

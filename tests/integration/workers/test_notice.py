"""The hours of its class tell a worker when to serve and to leave."""

import math
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tasks.settings import Settings
from tasks.topology import Notice
from tests.forked import running
from tests.working import CLASS, QUEUES, worker_settings
from workers.drain import NoticeWatch


@pytest.mark.parametrize(("begin", "end", "opens"), [(2, 3, 2), (-1, 1, 23)])
def test_a_worker_waits_until_its_class_serves_for_longer_than_a_drain_takes(
    settings: Settings, tmp_path: Path, begin: int, end: int, opens: int
) -> None:
    now = datetime.now(UTC)
    hours = f'"{now + timedelta(hours=begin):%H:%M}-{now + timedelta(hours=end):%H:%M}"'
    queues = QUEUES.replace("    warm: ", f"    available: {{hours: {hours}}}\n    warm: ")
    fleet = worker_settings(settings, tmp_path, queues.replace("lease: 1", "lease: 1, grace: 7200"))
    with running("workers", "workers", ["--class", CLASS], {**os.environ, **fleet.environment()}) as (_, waits):
        left = datetime.fromisoformat(waits.pop("opens")) - now
    assert (waits["ready"], waits["device"]) == ("worker", "cpu:0")
    assert abs(left - timedelta(hours=opens)) <= timedelta(minutes=1)


@pytest.mark.parametrize(("left", "notice"), [(math.inf, None), (61.0, None), (60.0, 60.0), (0.0, 0.0)])
def test_the_last_seconds_of_its_hours_are_a_notice_to_a_worker(left: float, notice: float | None) -> None:
    assert NoticeWatch(Notice(), print, closes=lambda: left, grace=60.0).look() == notice

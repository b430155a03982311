"""What counts as a notice that the machine is to be reclaimed, and how long it then stays."""

from pathlib import Path

import pytest

from tasks.topology import Notice
from workers.drain import NoticeWatch


@pytest.mark.cases("text, grace")
def test_a_file_says_when_the_machine_goes(text: str, grace: float, tmp_path: Path) -> None:
    (tmp_path / "reclaimed").write_text(text)
    assert NoticeWatch(Notice(file=str(tmp_path / "reclaimed")), print).look() == grace


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

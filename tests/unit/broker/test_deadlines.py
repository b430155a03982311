"""What is said of a job past its deadline."""

from typing import Any

import pytest

from broker.valkey.jobs import Course, exceeded


@pytest.mark.cases("course, message")
def test_the_text_has_the_deadline_and_where_the_time_went(course: dict[str, Any], message: str) -> None:
    assert exceeded(Course(**course)).message == message

"""What a worker knows of a job from its message and its claim."""

import pytest

from broker.valkey.claims import Claim, Verdict
from tests.builders import a_ticket
from tests.unit.workers.parts import a_delivery


@pytest.mark.parametrize(
    ("message", "record", "due"),
    [(60.0, 30.0, 30.0), (30.0, 60.0, 30.0), (30.0, 0.0, 30.0), (0.0, 30.0, 30.0), (0, 0, 0), (30.0, None, 30.0)],
)
def test_a_job_is_due_at_the_earlier_deadline_of_its_message_and_its_record(
    message: float, record: float | None, due: float
) -> None:
    claim = None if record is None else Claim(Verdict.RUN, "worker#1", deadline_at=record)
    assert a_delivery(a_ticket(deadline_at=message), claim=claim).deadline_at == due

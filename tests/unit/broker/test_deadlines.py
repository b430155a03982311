"""What is said of a job past its deadline."""

import pytest

from broker.valkey.jobs import Course, exceeded


@pytest.mark.parametrize(
    ("course", "message"),
    [
        (
            Course(105.0, 105.0, 100.0, "cpu.batch", started=104.1),
            "deadline of 5 s exceeded: queued 4.1 s on cpu.batch, ran 0.9 s",
        ),
        (Course(105.05, 105.0, 100.0, "cpu.batch"), "deadline of 5 s exceeded: queued 5.05 s on cpu.batch"),
        (Course(160.0, 160.0, 100.0, held=True), "deadline of 60 s exceeded: held 60 s, because no queue had capacity"),
        (Course(3700.4, 3700.0, 100.0), "deadline of 3600 s exceeded: queued 3600 s on taxiway.arrivals"),
        (Course(100.0, 97.5, 100.0), "deadline exceeded: it passed 2.5 s before the job was accepted"),
        (Course(7300.0, 0.0, 100.0, "tpu.bulk"), "its ticket expired before it ran: queued 7200 s on tpu.bulk"),
    ],
)
def test_the_text_has_the_deadline_and_where_the_time_went(course: Course, message: str) -> None:
    assert exceeded(course).message == message

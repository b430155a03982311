"""Stands for the Celery worker around the stages (`workers.stages.job.CeleryWorker`), and for its queues."""

from collections.abc import Sequence

from broker.valkey.class_queue import ClassQueue
from taxiway.contract.wire import Envelope
from taxiway.errors import TaxiwayError
from workers.stages.job import Delivery, Ended, Ending
from workers.stages.queues import AdmitQueue, EndingQueue


class NoQueue(ClassQueue):
    """Class queues from which nothing came."""

    def __init__(self) -> None:
        """Opens no connection."""

    def renew(self, tags: Sequence[str]) -> None:
        assert not tags

    def recover(self) -> int:
        return 0

    def put_back(self, tags: Sequence[str]) -> None:
        assert not tags

    def message(self, tag: str) -> bytes:
        return b""


class NoCelery:
    """A Celery worker that consumes nothing, and records its exit status."""

    def __init__(self) -> None:
        self.exited: int | None = None

    def queues(self) -> Sequence[str]:
        return []

    def receive(self, envelope: Envelope, body: bytes, *, tag: str, queue: str) -> None:
        raise AssertionError("nothing is fetched here")

    @property
    def receiving(self) -> int:
        return 0

    def tags(self) -> list[str]:
        return []

    def is_revoked(self, job: str) -> bool:
        return False

    def report_end(self, ended: Ended) -> None:
        """Nothing."""

    def report_release(self, delivery: Delivery, error: TaxiwayError | None = None) -> None:
        """Nothing."""

    def flush_events(self) -> None:
        """Nothing."""

    def flush_full_group(self) -> None:
        """Nothing."""

    def exit(self, status: int) -> None:
        self.exited = status


class Endings(EndingQueue):
    """Keeps what ended."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Ending] = []

    def put(self, endings: Sequence[Ending]) -> None:
        self.all += endings


class Admissions(AdmitQueue):
    """Keeps the deliveries to be claimed, with the pause before each."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[Delivery, float]] = []

    def put(self, delivery: Delivery, *, pause: float = 0.0) -> None:
        self.all.append((delivery, pause))

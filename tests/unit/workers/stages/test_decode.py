"""How a burst's requests are read: what they refer to is fetched for many of them at once."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tasks.models.folder import ModelsFolder
from tasks.queues.queues_file import QueuesFile
from tasks.settings import TREE
from taxiway.contract.request import Request
from taxiway.contract.values import Blobs, Reference
from taxiway.contract.wire import request_body
from taxiway.errors import InvalidRequestError, ResultExpiredError
from tests.builders import a_class, a_ticket
from tests.graphs import SCALE_SPECS, scale_graph, write_model
from tests.unit.workers.parts import a_delivery
from workers.stages.admit import FETCHED_BYTES, JobReader
from workers.stages.job import Delivery

CLASS = "cpu.batch"


class Desk:
    """A reader, with the blobs that are there and what was fetched by each call."""

    def __init__(self) -> None:
        self.blobs = Blobs(limit=16)
        self.calls: list[list[str]] = []
        self.reader = JobReader(
            ModelsFolder(TREE / "models", QueuesFile(TREE / "queues.yaml")), {CLASS: a_class()}, self._fetch
        )

    def delivery(self, payload: bytes) -> Delivery:
        body = request_body(Request(model="echo", inputs={"payload": payload}), self.blobs)
        return a_delivery(a_ticket(variants={CLASS: "echo"}), body, hardware_class=CLASS)

    def read(self, *deliveries: Delivery) -> list[bytes]:
        """The payloads of the jobs."""
        groups = self.reader.groups(deliveries)
        jobs = [self.reader.read(one, 0.0, contents) for some, contents in groups for one in some]
        return [job.rows[0]["payload"] for job in jobs]

    def _fetch(self, found: Sequence[Reference]) -> dict[str, bytes | None]:
        refs = [reference.ref for reference in found]
        self.calls.append(refs)
        kept = self.blobs.contents
        return {ref: bytes(kept[ref]) if ref in kept else None for ref in refs}


@pytest.mark.parametrize(
    ("given", "fetched"),
    [
        ([b"short"], []),
        ([b"a" * 20, b"short", b"c" * 30], [2]),
        ([b"a" * (FETCHED_BYTES + 1), b"b" * FETCHED_BYTES, b"c" * 20], [1, 1, 1]),  # large ones apart, in order
    ],
    ids=["no blob", "several", "large"],
)
def test_what_several_requests_refer_to_is_fetched_by_one_call(given: list[bytes], fetched: list[int]) -> None:
    desk = Desk()
    assert desk.read(*map(desk.delivery, given)) == given
    assert [len(call) for call in desk.calls] == fetched


def test_a_blob_that_is_gone_fails_its_request() -> None:
    desk = Desk()
    delivery = desk.delivery(b"a" * 20)
    desk.blobs.contents.clear()
    with pytest.raises(ResultExpiredError):
        desk.read(delivery)


def test_a_request_that_a_router_accepted_by_a_newer_model_yaml_is_bound_by_that(tmp_path: Path) -> None:
    write_model(tmp_path, "scale", scale_graph(2.0), **SCALE_SPECS)
    reader = JobReader(ModelsFolder(tmp_path, QueuesFile(TREE / "queues.yaml")), {CLASS: a_class()}, lambda found: {})
    body = request_body(Request(model="scale", inputs={"z": [[1.0, 2.0]]}), Blobs(limit=16))
    delivery = a_delivery(a_ticket(model="scale:1", variants={CLASS: "onnx"}), body, hardware_class=CLASS)
    with pytest.raises(InvalidRequestError):
        reader.read(delivery, 0.0, {})
    renamed = {**SCALE_SPECS, "inputs": [{**SCALE_SPECS["inputs"][0], "name": "z"}]}
    write_model(tmp_path, "scale", scale_graph(2.0, name="z"), **renamed)
    assert reader.read(delivery, 0.0, {}).rows[0]["z"].tolist() == [1.0, 2.0]

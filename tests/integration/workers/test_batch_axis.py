"""A model like silero-vad on a real worker: its state has the batch on the second axis, its sample rate has none."""

from collections.abc import Iterator

import numpy as np
import pytest

from tasks.settings import Settings
from taxiway import Client
from taxiway.contract.values import to_array, to_wire
from taxiway.errors import InvalidRequestError
from tests.graphs import VAD_SPECS, vad_graph, write_model
from tests.serving import ServedFleet, served_fleet
from tests.working import QUEUES, Tower, worker_settings


@pytest.fixture(scope="module")
def fleet(lasting: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedFleet]:
    queues = QUEUES.replace("[python, echo]", "[onnx]").replace("warm: [echo, slab]", "warm: [vad]")
    base = worker_settings(lasting, tmp_path_factory.mktemp("vad"), queues)
    write_model(base.models, "vad", vad_graph(), **VAD_SPECS)
    with served_fleet(base, "vad") as fleet:
        yield fleet


def row(number: float, rate: int = 16000) -> dict[str, object]:
    """One row: its input is `number` throughout, and its state holds it at the first place."""
    state = np.zeros((2, 128), np.float32)
    state[0, 0] = number
    return {"input": np.full(4, number, np.float32), "state": state, "sr": rate}


def test_two_requests_run_in_one_batch_and_each_gets_its_own_row(fleet: ServedFleet) -> None:
    with Tower(fleet.settings) as tower:
        rows = [row(1.0), row(2.0), row(3.0, rate=8000)]
        tower.queue(*(orders := [tower.message("vad", to_wire(one), variant="onnx") for one in rows]))
        answers = [tower.result(order.headers["id"]) for order in orders]
    assert answers[0].report.batch > 1
    outputs = [to_array(answer.outputs["output"], "output").tolist() for answer in answers]
    assert outputs == [[16002.0], [16004.0], [8006.0]]
    states = [to_array(answer.outputs["stateN"], "stateN") for answer in answers]
    assert [state.shape for state in states] == [(2, 128)] * 3
    assert [state[0, 0] for state in states] == [2.0, 3.0, 4.0]


def test_over_http_tensors_have_the_models_own_shape_and_one_row_comes_back_without_the_batch_axis(
    fleet: ServedFleet,
) -> None:
    batch = {
        "input": np.full((3, 4), [[1.0], [2.0], [3.0]], np.float32),
        "state": np.zeros((2, 3, 128), np.float32),
        "sr": 16000,
    }
    with Client(fleet.router.http) as client:
        one = client.infer("vad", row(5.0), deadline=30).outputs
        three = client.infer("vad", batch, deadline=30).outputs
        with pytest.raises(InvalidRequestError, match=r"inputs.sr: expected shape \[\] \(without a batch axis\)"):
            client.infer("vad", {**batch, "sr": [16000] * 3}, deadline=30)
    assert one["output"] == pytest.approx([16010.0])
    assert np.array(one["stateN"]).shape == (2, 128)
    assert np.array(three["output"]).tolist() == [[16001.0], [16002.0], [16003.0]]
    assert np.array(three["stateN"]).shape == (2, 3, 128)

"""Whatever a model's code raises ends its job with an error that can be stored, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.models.profiles import ProfileBook
from tasks.settings import TREE
from taxiway.contract.job import failure_meta, read_meta, read_result
from taxiway.errors import MAX_ERROR, ExecutionError, InvalidRequestError, TaxiwayError
from tests.builders import a_class
from workers.device import find_device
from workers.executor import Executor, as_ours
from workers.learned import Loaded
from workers.port import Item, Row, Runtime
from workers.runtimes.echo import EchoRuntime


class Silent(Exception):
    """An error that fails to say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


RAISED = [
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    Silent(),
    ValueError("a\ud800"),
    ValueError("x" * 10_000_000),
    MemoryError(),
    RecursionError("deep"),
]


class Raising:
    """A pipeline that fails for one of its items."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        return Item({"payload": np.array(row["payload"])}, 1, parameters)

    def run(self, runtime: Runtime, items: Sequence[Item]) -> list[Row]:
        if any(item.arrays["payload"] == 7 for item in items):
            raise self._error
        return [{"payload": item.arrays["payload"]} for item in items]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_what_a_model_raises_fails_its_row_alone_with_a_text_of_bounded_length(
    error: BaseException, tmp_path: Path
) -> None:
    hardware = a_class()
    executor = Executor(hardware, find_device(hardware, "cpu:0", emulate=False), ArtefactStore(tmp_path), threads=1)
    model = load_catalogue(TREE / "models").resolve("echo")
    known = ProfileBook().lookup(model, "echo", "cpu", "test")
    loaded = Loaded("echo:1/echo", model, model.variants["echo"], Raising(error), EchoRuntime(), known, 0.0)
    answers = executor.run(loaded, [loaded.pipeline.prepare({"payload": n}, {}) for n in (6, 7, 8)])
    failed = answers.pop(1)
    assert isinstance(failed, TaxiwayError)
    assert [isinstance(answer, dict) for answer in answers] == [True, True]
    with pytest.raises(type(failed)):
        read_result(read_meta(failure_meta("job", failed)))
    assert len(failed.message.encode()) <= MAX_ERROR


def test_an_error_is_stored_whatever_its_text_and_its_details_hold() -> None:
    error = ExecutionError("é\ud800" * 10_000, field="f" * 10_000, near=["n" * 9999], odd={1, 2}.__iter__())
    stored = failure_meta("job", error)
    assert len(stored) < 2 * MAX_ERROR
    with pytest.raises(ExecutionError, match=r"é\\ud800"):
        read_result(read_meta(stored))
    plain = InvalidRequestError("x", field="f" * 10_000, near=["n" * 9999])
    assert len(msgspec.json.encode(plain.details)) < 2 * MAX_ERROR + 50


def test_an_error_of_ours_stays_itself_and_a_foreign_one_names_its_type() -> None:
    ours = InvalidRequestError("row")
    assert as_ours("m/v", ours) is ours
    assert as_ours("m/v", SystemExit(3)).message == "m/v: SystemExit: 3"

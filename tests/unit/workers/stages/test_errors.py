"""Whatever a model's code raises ends its job with an error that can be stored, and nothing else."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from PIL import Image

from tasks.models.profiles import ProfileBook
from taxiway.contract.job import failure_meta, read_meta, read_result
from taxiway.errors import MAX_ERROR, ExecutionError, InvalidRequestError, TaxiwayError
from tests.unit.workers.parts import MODELS, an_executor
from workers.decide.faults import text_of
from workers.executor import as_ours
from workers.learned import Loaded
from workers.pipelines.image import decode
from workers.port import Item, Row, Runtime
from workers.runtimes.echo import EchoRuntime
from workers.stages.admit import named_row
from workers.stages.job import RunningJob


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
def test_what_a_model_raises_fails_its_row_alone_in_few_words(error: BaseException, tmp_path: Path) -> None:
    executor, model = an_executor(tmp_path), MODELS.resolve("echo")
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


@dataclass
class Rows:
    """As much of a job as names a row."""

    rows: tuple[Any, ...]


def named(error: TaxiwayError, index: int, rows: int) -> str:
    return named_row(error, index, cast(RunningJob, Rows((None,) * rows))).message


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.cases(
    "content, message", [(jpeg()[:-30], "expected a valid JPEG or PNG, got a corrupt one: image file is truncated")]
)
def test_a_bad_photograph_is_named_by_its_input_and_row_and_no_address(content: object, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode(content, 8)
    assert "0x" not in caught.value.message
    assert named(caught.value, 0, 1).startswith(f"inputs.image: {message}")
    assert named(caught.value, 3, 4).startswith(f"inputs.image[3]: {message}")


def test_an_error_that_is_not_about_an_input_keeps_its_text_behind_the_row() -> None:
    assert named(InvalidRequestError("parameters.k: expected more", field="parameters.k"), 1, 2) == (
        "row 1: parameters.k: expected more"
    )


@pytest.mark.cases("text, shown")
def test_what_a_library_says_has_no_addresses_of_objects(text: str, shown: str) -> None:
    assert text_of(RuntimeError(text)) == shown

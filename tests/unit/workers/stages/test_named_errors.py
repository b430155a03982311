"""What a caller reads of a wrong row: which input it is, and nothing of this process."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, cast

import pytest
from PIL import Image

from taxiway.errors import InvalidRequestError, TaxiwayError
from workers.decide.faults import text_of
from workers.pipelines.image import decode
from workers.stages.admit import named_row
from workers.stages.job import RunningJob


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GIF89a, not that", "expected a JPEG or PNG, got 16 bytes that begin with b'GIF89a, '"),
        (b"", "expected a JPEG or PNG, got 0 bytes that begin with b''"),
        (jpeg()[:-30], "expected a valid JPEG or PNG, got a corrupt one: image file is truncated"),
        ("text", "expected JPEG or PNG bytes, got str"),
    ],
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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "cannot identify image file <_io.BytesIO object at 0x7f3c5c1b2ac0>",
            "cannot identify image file <_io.BytesIO>",
        ),
        ("<function call at 0x7F00> failed twice, <lambda> at 0x1", "<function call> failed twice, <lambda> at 0x1"),
        ("a < b and c > d", "a < b and c > d"),
    ],
)
def test_what_a_library_says_has_no_addresses_of_objects(text: str, shown: str) -> None:
    assert text_of(RuntimeError(text)) == shown

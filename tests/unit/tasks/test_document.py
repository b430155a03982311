from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest

from tasks.document import DocumentError, Size, parse_document, parse_size


class Circle(msgspec.Struct, forbid_unknown_fields=True, tag_field="kind", tag="circle"):
    radius: Annotated[float, msgspec.Meta(gt=0)]


class Square(msgspec.Struct, forbid_unknown_fields=True, tag_field="kind", tag="square"):
    side: int


class Drawing(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    colour: Literal["red", "blue"] = "red"
    size: Size | None = None
    shapes: dict[Annotated[str, msgspec.Meta(pattern="^[a-z]+$")], Circle | Square] = {}
    points: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    layers: int | Literal["auto"] = 1
    title: str | None = None
    groups: dict[str, dict[str, int]] = {}
    anything: Any = None


def parse(text: str) -> Drawing:
    return parse_document(text, Drawing, file="drawing.yaml", error=DocumentError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: green", "colour: expected one of ['blue', 'red'], got 'green'"),
        ("size: 5 GB", "size: expected bytes (an integer >= 0, or text such as 512MiB or 24GiB), got '5 GB'"),
        ("size: -1", "size: expected bytes (an integer >= 0, or text such as 512MiB or 24GiB), got -1"),
        ("layers: many", "layers: expected `int` or one of ['auto'], got 'many'"),
        ("title: 5", "title: expected `str | null`, got 5"),
        ("points: 5", "points: expected `array`, got 5"),
        ("points: [1, 2, -3]", "points.2: expected `int` >= 0, got -3"),
        ("shapes: {a: {kind: circle, radius: 0}}", "shapes.a.radius: expected `float` > 0.0, got 0"),
        ("shapes: {a: {kind: circle}}", "shapes.a.radius: expected a value, got nothing"),
        ("shapes: {a: {radius: 1}}", "shapes.a.kind: expected one of ['circle', 'square'], got nothing"),
        ("shapes: {a: {kind: oval}}", "shapes.a.kind: expected one of ['circle', 'square'], got 'oval'"),
        (
            "shapes: {a: {kind: square, side: 1}, B: 1}",
            "shapes.B: expected a key that is `str` matching regex '^[a-z]+$'",
        ),
        ("shapes: {a: {kind: square, side: 1}, b: {kind: square, side: x}}", "shapes.b.side: expected `int`, got"),
        ("shapes: {1: 2}", "shapes.1: expected a key that is text (put it in quotes), got 1"),
        ("colr: red", "colr: expected no such field, but one of ["),
        ("colr: red", "(did you mean colour?), got 'red'"),
        ("anything: .nan", "anything: expected a finite number, got nan"),
        ("anything: [1, -.inf]", "anything.1: expected a finite number, got -inf"),
        ("anything: 2024-01-02", "(put dates in quotes), got datetime.date(2024, 1, 2)"),
        ("anything: 99999999999999999999", "anything: expected an integer of at most 64 bits"),
        ('anything: "\\ud800"', "line 1, column 14: expected YAML, got found invalid Unicode character"),
        ("title: a\ntitle: b", "line 2, column 1: expected YAML, got the key 'title' twice"),
        ("title: [", "line 2, column 1: expected YAML, got "),
        ("", "document: expected `object`, got None"),
        ("[]", "document: expected `object`, got []"),
    ],
)
def test_what_is_wrong_is_named_by_file_path_expectation_and_value(text: str, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse(text)
    assert str(caught.value).startswith("drawing.yaml: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "!!timestamp x",
        "!!int ''",
        "2024-13-01",
        "0b_",
        "[" * 5000,
        "&a [*a]",
        "!!set {a}",
        "!!binary aGk=",
        "\x00",
        "%",
    ],
)
def test_text_that_the_yaml_library_stumbles_over_is_a_document_error(text: str) -> None:
    with pytest.raises(DocumentError):
        parse(text)


def test_aliases_of_aliases_do_not_fill_the_memory() -> None:
    laughs = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12))
    with pytest.raises(DocumentError, match="at most 100000 values"):
        parse(f"l0: &l0 [lol]\n{laughs}")


def test_a_large_value_is_shown_short() -> None:
    with pytest.raises(DocumentError) as caught:
        parse(f"colour: [{', '.join(['x' * 50] * 1000)}]")
    assert len(str(caught.value)) < 400


def test_the_error_holds_its_parts() -> None:
    with pytest.raises(DocumentError) as caught:
        parse("points: [x]")
    error = caught.value
    assert (error.file, error.path, error.expected, error.value) == (
        "drawing.yaml",
        "points.0",
        "`int`",
        "x",
    )


def test_floats_are_written_as_in_json() -> None:
    assert parse("anything: [1e-3, 2.5E+2, -1e3]").anything == [0.001, 250.0, -1000.0]


@pytest.mark.parametrize(
    ("value", "size"),
    [(0, 0), (7, 7), ("64KiB", 65536), ("1.5 MiB", 1572864), ("24GiB", 24 * 2**30), ("2TiB", 2**41), ("10B", 10)],
)
def test_a_size_is_a_number_of_bytes_or_has_a_binary_unit(value: object, size: int) -> None:
    assert parse_size(value) == size


@pytest.mark.parametrize("value", [-1, True, 1.5, None, "", "5", "5GB", "-5GiB", "GiB", "9" * 400 + "TiB", "5GiB\n"])
def test_what_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected bytes"):
        parse_size(value)

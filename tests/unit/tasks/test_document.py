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


@pytest.mark.cases("text, message")
def test_what_is_wrong_is_named_by_file_path_expectation_and_value(text: str, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse(text)
    assert str(caught.value).startswith("drawing.yaml: ")
    assert message in str(caught.value)


@pytest.mark.cases("text", ["[" * 5000])
def test_text_that_the_yaml_library_stumbles_over_is_a_document_error(text: str) -> None:
    with pytest.raises(DocumentError):
        parse(text)


def test_aliases_of_aliases_do_not_fill_the_memory() -> None:
    laughs = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12))
    with pytest.raises(DocumentError, match="at most 100000 values"):
        parse(f"l0: &l0 [lol]\n{laughs}")


@pytest.mark.parametrize("value", [-1, True, 1.5, None, "", "5", "5GB", "-5GiB", "GiB", "9" * 400 + "TiB", "5GiB\n"])
def test_what_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected bytes"):
        parse_size(value)

import pytest

from router.service.append_only_file import leaves_holes


@pytest.mark.cases("said, holes")
def test_only_versions_with_holes_in_their_file_need_a_rewrite(said: dict[str, str], holes: bool) -> None:
    assert leaves_holes(said) is holes

from __future__ import annotations

import pytest

from router.service.append_only_file import leaves_holes


@pytest.mark.parametrize(
    ("said", "holes"),
    [
        ({"redis_version": "7.2.4", "valkey_version": "8.1.1"}, True),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, True),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.3"}, False),
        ({"redis_version": "7.2.4", "valkey_version": "10.0.0-rc1"}, False),
        ({"redis_version": "6.2.14"}, False),
        ({"redis_version": "7.4.2"}, True),
        ({"redis_version": "8.0.0"}, False),
        ({}, False),
    ],
)
def test_only_versions_that_leave_holes_in_their_append_only_file_need_a_rewrite(
    said: dict[str, str], holes: bool
) -> None:
    assert leaves_holes(said) is holes

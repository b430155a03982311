"""What a machine has, as its control group says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.machine import memory_of_container


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
@pytest.mark.parametrize(("text", "limit"), [("536870912\n", 2**29), ("max\n", None), ("9223372036854771712\n", None)])
def test_a_container_has_the_memory_of_its_control_group(
    tmp_path: Path, file: str, text: str, limit: int | None
) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / file).write_text(text)
    assert memory_of_container(tmp_path) == limit


def test_a_machine_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert memory_of_container(tmp_path) is None

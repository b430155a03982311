"""Nothing of private requests is outside their site, whatever fails; usual proxies let them out in the same run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tasks.settings import TREE

REQUESTS = 300


@pytest.fixture(scope="module")
def drill() -> Iterator[Any]:
    command = [sys.executable, "-m", "lab.drills.canary", "--requests", str(REQUESTS), "--rate", "14", "--json"]
    yield json.loads(subprocess.run(command, cwd=TREE, stdout=subprocess.PIPE, check=False, timeout=280).stdout)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_canary_is_outside_the_edge_under_load_and_faults(drill: Any) -> None:
    assert {"cut", "kill_home", "kill_router"} <= drill["faults"].keys()
    assert sum(drill["requests"]["ward"].values()) == REQUESTS
    assert drill["requests"]["ward"]["answered"] > 0
    assert drill["requests"]["vault"]["answered"] > 0
    found = {one["place"]: one for one in drill["found"]}
    abroad = {place: one["ward"] + one["vault"] for place, one in found.items() if not place.startswith("edge")}
    assert abroad == dict.fromkeys(abroad, 0)
    assert found["edge: keys"]["vault"] == 0  # sealed there, too


@pytest.mark.slow
def test_the_search_finds_what_is_there(drill: Any) -> None:
    found = {one["place"]: one for one in drill["found"]}
    for place in ("line", "cloud: keys", "cloud: snapshot and append-only file"):
        assert found[place]["others"] > 0
    assert found["edge: keys"]["ward"] > 0


@pytest.mark.slow
def test_rules_that_fall_through_and_fallbacks_let_private_requests_out(drill: Any) -> None:
    assert drill["private requests abroad"]["taxiway"] == 0
    assert drill["private requests abroad"]["rules with fallthrough"] == REQUESTS // 10
    assert drill["private requests abroad"]["proxy with fallbacks"] > 0

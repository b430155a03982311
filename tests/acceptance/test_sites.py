"""Three sites of one machine: work goes where it is cheap and in time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pytest

import taxiway
from tasks.settings import TREE
from tests.routing import HTTP, eventually

pytestmark = pytest.mark.slow  # three fleets start

STORY = "Tell a long story of a calm flight over the sea."
SUITED = {"generate": "cloud", "embed": "lab", "sentiment": "cpu.batch"}
"""Where each model is cheapest, once all are loaded."""
STARTS_WITHIN = 280  # seconds, on a busy machine


@dataclass(frozen=True)
class Sites:
    """The fleets of examples/sites: a client of the edge, and where words are typed."""

    edge: taxiway.Client
    url: str
    typed: IO[str]

    def say(self, words: str) -> None:
        self.typed.write(words + "\n")
        self.typed.flush()

    def explained(self, job: str) -> Any:
        """Why a job of the edge is where it is."""
        answer = HTTP.get(f"{self.url}/v2/jobs/{job}/placement", timeout=60)
        return answer.raise_for_status().json()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    folder = tmp_path_factory.mktemp("sites")
    example = TREE / "examples" / "sites"
    command = [sys.executable, "-m", "taxiway", "up", "--json", "--data", str(folder), "--sites", str(example)]
    command += ["--script", str(example / "lines")]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TAXIWAY_")}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        addresses = json.loads(process.stdout.readline())
        with taxiway.Client(addresses["edge"]) as edge:
            eventually(lambda: {name: placed(edge, name, STORY) for name in SUITED} == SUITED)
            yield Sites(edge, addresses["edge"], process.stdin)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STARTS_WITHIN)
        process.stdin.close()
        process.stdout.close()


def placed(client: taxiway.Client, model: str, inputs: Any, **terms: Any) -> str | None:
    """Where a request would go now; None if nowhere."""
    found: str | None = client.what_if(model, inputs, **terms)["hardware_class"]
    return found


@pytest.mark.timeout(STARTS_WITHIN + 120)
def test_each_kind_of_work_goes_to_the_site_that_suits_it(sites: Sites) -> None:
    results = {
        "cpu.batch": sites.edge.infer("sentiment", "A calm flight.", timeout=120),
        "lab": sites.edge.infer("embed", "A calm flight.", timeout=120),
        "cloud": sites.edge.infer("generate", STORY, timeout=120),
    }
    assert {name: result.report.hardware_class for name, result in results.items()} == {name: name for name in results}
    assert len(results["cloud"].outputs["text"]) > 0
    job = sites.edge.submit("generate", STORY)
    job.result(timeout=120)
    (chosen,) = [one for one in sites.explained(job.id)["considered"] if one["chosen"]]
    assert chosen["warning"].startswith("offer of site cloud, ")


@pytest.mark.timeout(240)
def test_work_for_the_cloud_waits_while_the_line_is_cut_and_the_edge_goes_on(sites: Sites) -> None:
    sites.say("cut cloud")
    try:
        warned = "no line to the site: what only it can do waits for it"
        eventually(lambda: considered(sites, "generate", service="bulk").get("cloud") == warned)
        job = sites.edge.submit("generate", STORY, service="bulk")
        assert sites.edge.infer("sentiment", "A calm flight.", timeout=120).report.hardware_class == "cpu.batch"
    finally:
        sites.say("restore cloud")
    assert job.result(timeout=120).report.hardware_class == "cloud"


def considered(sites: Sites, model: str, **terms: Any) -> dict[str, Any]:
    """What is to be said of each class that could run a request now."""
    return {one["hardware_class"]: one["warning"] for one in sites.edge.what_if(model, STORY, **terms)["considered"]}

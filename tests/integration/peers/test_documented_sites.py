"""The files of docs/sites.md by which a cloud hands work to an edge that it cannot reach, with models of the tests."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tasks.settings import TREE
from tests.keyring import keys_in, secret_of
from tests.routing import eventually, router_process
from tests.sites import open_fleet

OF_TESTS = {
    "{sentiment: sentiment, generate: generate}": "{echo: echo, slab: slab}",
    "sentiment: sentiment": "echo: echo",
    "generate: generate": "slab: slab",
    "[torch, onnx]": "[echo]",
    "[onnx]": "[echo]",
    "device: cuda": "device: cpu",
}
"""What stands in the files for models and devices that a test lacks."""


def documented(url: str) -> tuple[str, str]:
    """The queues.yaml of the cloud and of the edge, whose cloud is at this URL."""
    text = (TREE / "docs" / "sites.md").read_text()
    for theirs, ours in {**OF_TESTS, "https://fleet.example.org": url}.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    edge, cloud, *_ = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    of_edge, of_cloud = (
        yaml.safe_load(re.search(rf"# in the {site}'s queues.yaml, below hardware\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]  # it is there
        for site in ("edge", "cloud")
    )
    edge["hardware"] |= of_edge
    cloud["hardware"] |= of_cloud
    return yaml.safe_dump(cloud), yaml.safe_dump(edge)


def test_the_documented_cloud_hands_work_to_the_documented_edge(valkey_url: str, tmp_path: Path) -> None:
    """The router that the edge connects to asks for a key; the edge serves by its own worker alone."""
    keys = keys_in(tmp_path / "keys.jsonl", edge=("submit",))
    with (
        open_fleet(valkey_url, tmp_path / "cloud", documented("https://unused")[0], "edge") as (cloud, _),
        router_process(cloud.settings, None, keys) as router,
        open_fleet(
            valkey_url,
            tmp_path / "edge",
            documented(router.http)[1],
            "cpu.batch",
            environment={"CLOUD_KEY": secret_of("edge")},
        ),
    ):
        eventually(lambda: cloud.client.what_if("echo", "x")["hardware_class"] == "edge")
        result = cloud.client.infer("echo", "to the edge", timeout=60)
        assert (result.report.hardware_class, result.outputs["payload"]) == ("edge", "to the edge")

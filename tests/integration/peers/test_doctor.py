"""What `taxiway doctor` says of a class that is another fleet."""

from __future__ import annotations

from pathlib import Path

from local.doctor import check_endpoints
from tests.routing import eventually
from tests.sites import FAR, NEAR, open_fleet


def test_the_doctor_finds_out_what_another_fleet_offers(valkey_url: str, tmp_path: Path) -> None:
    with open_fleet(valkey_url, tmp_path / "far", FAR, "cpu.batch") as (far, _):
        (tmp_path / "queues.yaml").write_text(NEAR.replace("URL", far.url))
        variables = {"TAXIWAY_QUEUES": str(tmp_path / "queues.yaml"), "TAXIWAY_MODELS": str(far.settings.models)}
        answers = f"endpoint cloud {far.url}", "answers, and lists echo, slab"
        eventually(lambda: answers in [(one.subject, one.value) for one in check_endpoints(variables)])
        gone = far.url
    (found,) = check_endpoints(variables)
    assert "cannot connect to" in found.value
    assert gone in found.subject

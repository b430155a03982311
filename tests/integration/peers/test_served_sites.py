"""A fleet that cannot be reached takes work over connections that it opens, also where several routers are."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tasks.site_key import public_text
from taxiway.contract.keys import job_key
from tests.certificates import authority
from tests.keyring import keys_in, secret_of
from tests.routing import eventually, router_process
from tests.sites import FAR, NEAR, PEER, SERVED, open_fleet, served_sites
from tests.stored import record_of

QUICK = {"samples": [4], "seed": [3]}


def test_a_worker_finds_the_router_that_has_the_connection_and_both_sides_are_who_they_say(
    valkey_url: str, tmp_path: Path
) -> None:
    """The second router of two has it, with TLS; the other fleet is known by its key."""
    ca, keys = authority(tmp_path), keys_in(tmp_path / "keys.jsonl", remote=("submit",))
    tls = ("--tls-cert", str(tmp_path / "server.pem"), "--tls-key", str(tmp_path / "server.key"))
    queues = NEAR.replace('url: "URL"', "peer: remote")
    site_key = Ed25519PrivateKey.generate()
    (tmp_path / "site.key").write_text(site_key.private_bytes_raw().hex())
    queues = queues.replace("peer: remote", f'peer: remote, public_key: "{public_text(site_key)}"')
    served = SERVED.replace('"URL"', "URL, key_env: NEAR_KEY, tls: {authorities: CA}").replace("CA", str(ca))
    with (
        open_fleet(valkey_url, tmp_path / "near", queues, PEER) as (near, _),
        router_process(near.settings, None, (*keys, *tls)) as second,
        open_fleet(
            valkey_url,
            tmp_path / "far",
            FAR.replace("service:", served.replace("URL", second.http), 1),
            "cpu.batch",
            environment={"NEAR_KEY": secret_of("remote"), "TAXIWAY_SITE_KEY": str(tmp_path / "site.key")},
        ) as (far, _),
    ):
        eventually(lambda: "signed at" in str(near.client.what_if("slab", QUICK)["considered"]))
        assert near.client.infer("slab", QUICK, timeout=60).report.hardware_class == PEER
        (name,) = [one.decode().removeprefix(job_key("")) for one in far.state.scan_iter(job_key("*"))]
        job = record_of(far.state, name)
        assert (job.tenant, job.hardware_class) == ("edge", "cpu.batch")
        assert far.client.job(name).status().state == "succeeded"


def test_a_fleet_takes_work_of_those_that_its_queues_yaml_says_now(valkey_url: str, tmp_path: Path) -> None:
    with served_sites(valkey_url, tmp_path / "sites") as sites:
        queues = sites.far.settings.queues
        serving = queues.read_text()
        queues.write_text(serving.replace("serves: edge", "models: {slab: slab}"))
        eventually(lambda: not sites.offered())
        queues.write_text(serving)
        eventually(sites.offered)
        assert sites.near.client.infer("slab", QUICK, timeout=60).report.hardware_class == PEER

"""Sealed labels: only workers with the key, and who asked, see inputs, results and the texts of errors."""

from __future__ import annotations

import base64
import secrets
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from celery.result import AsyncResult

import taxiway
from tasks.celery_app import make_app
from tasks.settings import TREE
from tasks.topology import load_topology
from taxiway.contract.keys import ARRIVALS, job_key, priority_list, result_key
from taxiway.contract.request import Request
from taxiway.contract.sealed import ContentFacts, Sealed
from taxiway.contract.wire import infer_message
from taxiway.errors import DeadLetteredError, ExecutionError, SealedError
from taxiway.sealing import SealKeys
from tests.engine import Engine, serving
from tests.narrowing import as_bytes
from tests.routing import HTTP, eventually, router_process
from tests.scanning import forms, hits, values_of
from tests.sites import FAR, NEAR, PEER, OpenSite, TwoSites, two_sites, with_engine
from tests.working import empty_fleet, worker_process, worker_settings

KEY = secrets.token_bytes(32)
OTHER = secrets.token_bytes(32)


def public(key: bytes) -> str:
    (name,) = SealKeys([key]).names
    return SealKeys([key]).public(name).hex()


ASKED: dict[str, Any] = {"chat": {"messages": [{"role": "user", "content": "x"}]}}
SEALED = f"locality: {{sealed: {{vault: [{public(KEY)}]}}}}\n"
HOME = f"{NEAR.replace('labels: [ward]', 'labels: [ward, vault]')}{SEALED}"


@pytest.fixture(scope="module")
def site(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenSite]:
    """A fleet of one worker, which has the key."""
    with fleet(valkey_url, tmp_path_factory.mktemp("sealed"), HOME) as opened:
        yield opened


@contextmanager
def fleet(
    valkey_url: str,
    folder: Path,
    queues: str,
    *keys: bytes,
    ready: str = "vault",
    hardware_class: str = "cpu.batch",
    model: str = "echo",
) -> Iterator[OpenSite]:
    settings = worker_settings(
        empty_fleet(valkey_url, lasting=True), folder, queues.replace("URL", "http://127.0.0.1:9")
    )
    (settings.models / "chat").symlink_to(TREE / "models" / "chat")
    settings = replace(settings, seals=keys or (KEY,))
    with ExitStack() as stack:
        logs = [stack.enter_context((folder / name).open("wb")) for name in ("router.log", "worker.log")]
        stack.enter_context(worker_process(settings, "--class", hardware_class, log=logs[1]))
        process = stack.enter_context(router_process(settings, logs[0]))
        client = stack.enter_context(taxiway.Client(process.http))
        state = stack.enter_context(redis.Redis.from_url(settings.broker))
        eventually(lambda: client.what_if(model, ASKED.get(model, "x"), locality=ready)["hardware_class"])
        yield OpenSite(settings, process, client, state)


def canary() -> str:
    return f"canary-{uuid.uuid4().hex}"


def seen(site: OpenSite, text: str) -> int:
    """How often a text is in the site's store and logs."""
    sought = forms(text)
    metrics = HTTP.get(f"{site.url}/metrics").content
    logs = [path.read_bytes() for path in site.settings.queues.parent.glob("*.log")]
    return sum(hits(content, sought) for content in (*values_of(site.state), *logs, metrics))


@pytest.mark.parametrize("size", [0, 100_000, 2**20])
def test_neither_inputs_nor_results_are_in_the_store_and_the_router_opens_them(site: OpenSite, size: int) -> None:
    text, plain = canary(), canary()
    payload = text + "x" * size
    assert site.client.infer("echo", payload, locality="vault", timeout=60).outputs["payload"] == payload
    assert seen(site, text) == 0
    site.client.infer("echo", plain, timeout=60)
    assert seen(site, plain) > 0


def test_tensors_and_several_rows_are_sealed_and_opened(site: OpenSite) -> None:
    result = site.client.infer("slab", {"samples": [1, 2, 4], "seed": [8, 8, 8]}, locality="vault", timeout=60)
    assert result.outputs["estimate"] == [8.0, 4.0, 2.0]


def test_a_client_of_the_broker_says_that_the_result_is_sealed_and_where_to_read_it(site: OpenSite) -> None:
    text = canary()
    with taxiway.Client(site.settings.broker) as client:
        job = client.submit("echo", text, locality="vault", idempotency_key=canary())
        with pytest.raises(SealedError, match=r"the result is sealed \(key .*HTTP API"):
            job.result(60)
    assert site.client.job(job.id).result(60).outputs["payload"] == text
    assert seen(site, text) == 0


def test_celery_s_result_shows_that_it_is_sealed(site: OpenSite) -> None:
    job, text = str(uuid.uuid4()), canary()
    app = make_app(site.settings, load_topology(site.settings.queues))
    fields = {"locality": "vault"}
    app.send_task("taxiway.infer", ["echo", text], fields, task_id=job, queue="taxiway.arrivals")
    found: Any = AsyncResult(job, app=app).get(timeout=60)
    assert list(found["outputs"]) == ["__sealed__"]
    assert seen(site, text) == 0


def test_an_error_keeps_its_class_and_its_text_is_for_who_has_the_key(site: OpenSite) -> None:
    job = site.client.submit("slab", {"samples": [0], "seed": [1]}, locality="vault")
    with pytest.raises(ExecutionError, match="division by zero"):
        job.result(60)
    stored = as_bytes(site.state.get(result_key(job.id)))
    assert b"the text of this error is sealed" in stored
    assert seen(site, "float division") == 0


def sent(site: OpenSite, sealed: Sealed, job: str) -> Any:
    """The end of a job whose producer has sealed its inputs."""
    request = Request(model="echo", inputs=sealed.value, locality="vault")
    site.state.lpush(priority_list(ARRIVALS, 1), infer_message(job, request, reply="", origin="test"))
    eventually(lambda: site.state.exists(job_key(job)))
    return site.client.job(job).result(60)


def changed(sealed: Sealed, how: str) -> Sealed:
    content = bytearray(base64.b64decode(sealed.content))
    content[len(content) // 2] ^= 1
    changes = {"content": base64.b64encode(content).decode(), "job": str(uuid.uuid4()), "model": "slab"}
    return msgspec.structs.replace(sealed, **{how: changes[how]})


def test_altered_inputs_and_those_of_another_job_or_model_are_parked_and_counted(
    valkey_url: str, tmp_path: Path
) -> None:
    with fleet(valkey_url, tmp_path, HOME) as site:
        key, facts = bytes.fromhex(public(KEY)), ContentFacts(size=1)
        for number, how in enumerate(("content", "job", "model"), 1):
            job = str(uuid.uuid4())
            sealed = SealKeys().seal_inputs(["x", {}], [key], job, "echo", facts)
            with pytest.raises(DeadLetteredError, match="sealed"):
                sent(site, changed(sealed, how), job)
            assert f"given up: {'sealed for' if how != 'content' else 'cannot be opened'}" in dead_letters(site)
            eventually(partial(counted, site, f'taxiway_rejected_total{{class="cpu.batch"}} {number}.0'))
        job = str(uuid.uuid4())
        sealed = SealKeys().seal_inputs(["x", {}], [key], job, "echo", facts)
        assert sent(site, sealed, job).outputs["payload"] == "x"


def counted(site: OpenSite, line: str) -> bool:
    return line in HTTP.get(f"{site.url}/metrics").text


def dead_letters(site: OpenSite) -> str:
    return HTTP.get(f"{site.url}/v2/dead").text


def test_an_altered_result_is_refused_and_counted(site: OpenSite) -> None:
    one, other = (site.client.submit("echo", text, locality="vault") for text in "ab")
    stored = [(job.result(60), as_bytes(site.state.get(result_key(job.id))))[1] for job in (one, other)]
    swapped = msgspec.json.decode(stored[1])
    site.state.set(result_key(one.id), msgspec.json.encode({**swapped, "task_id": one.id}))
    answer = HTTP.get(f"{site.url}/v2/jobs/{one.id}/result")
    assert (answer.status_code, answer.json()["code"]) == (403, "sealed")
    assert counted(site, 'taxiway_refused_total{code="sealed"} 1.0')


def test_a_class_whose_workers_have_no_key_is_refused_with_that_reason(valkey_url: str, tmp_path: Path) -> None:
    with fleet(valkey_url, tmp_path, HOME, OTHER, ready="home") as site:
        found = site.client.what_if("echo", "x", locality="vault")
        reasons = [one["reason"] for one in found["refused"] if one["hardware_class"] == "cpu.batch"]
        assert any(f"has no key of the sealed label 'vault' ({SealKeys([KEY]).names[0]})" in why for why in reasons)
        with pytest.raises(taxiway.NoDeviceError):
            site.client.infer("echo", "x", locality="vault", timeout=60)


def test_a_rotated_key_still_opens_and_the_newest_seals(valkey_url: str, tmp_path: Path) -> None:
    rotated = HOME.replace(public(KEY), f"{public(OTHER)}, {public(KEY)}")
    with fleet(valkey_url, tmp_path, rotated, KEY, OTHER) as site:
        job = str(uuid.uuid4())
        sealed = SealKeys().seal_inputs(["old", {}], [bytes.fromhex(public(KEY))], job, "echo", ContentFacts())
        assert sent(site, sealed, job).outputs["payload"] == "old"
        newest = site.client.submit("echo", "new", locality="vault")
        assert newest.result(60).outputs["payload"] == "new"
        assert SealKeys([OTHER]).names[0].encode() in as_bytes(site.state.get(result_key(newest.id)))


def test_a_sealed_chat_is_streamed_whole_at_its_end_and_leaves_no_pieces(valkey_url: str, tmp_path: Path) -> None:
    text = canary()
    with serving(Engine(script=f"calm {text} ahead")) as engine:
        queues = with_engine(HOME, engine.url, "[vault]")
        with fleet(valkey_url, tmp_path, queues, hardware_class="engine", model="chat") as site:
            asked = {"model": "chat", "messages": [{"role": "user", "content": text}], "stream": True}
            options: Any = {"json": asked, "headers": {"X-Taxiway-Locality": "vault"}, "timeout": 60}
            answer = HTTP.post(f"{site.url}/v1/chat/completions", **options)
            assert text in answer.text
            assert "[DONE]" in answer.text
            assert seen(site, text) == 0


THERE = FAR.replace("    max_wait: 0\n", "    max_wait: 0\n    labels: [vault]\n", 1) + SEALED
HERE = HOME.replace("    device: endpoint\n", "    device: endpoint\n    labels: [vault]\n")


@pytest.fixture(scope="module")
def sites(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoSites]:
    """Two fleets, of whose far one only the worker has the key."""
    folder = tmp_path_factory.mktemp("sealed-sites")
    with two_sites(valkey_url, folder, "cpu.batch", far=THERE, queues=HERE, lasting=True, seals=(KEY,)) as opened:
        eventually(lambda: opened.near.client.what_if("echo", "x", locality="vault")["hardware_class"] == PEER)
        yield opened


def test_sealed_work_and_its_errors_are_read_here_and_not_by_the_router_and_store_of_the_fleet_that_runs_it(
    sites: TwoSites,
) -> None:
    text, plain = canary(), canary()
    result = sites.near.client.infer("echo", [text, text + "!"], locality="vault", timeout=60)
    assert (result.report.hardware_class, result.outputs["payload"]) == (PEER, [text, text + "!"])
    assert seen(sites.far, text) == 0
    assert sites.near.client.infer("echo", plain, timeout=60).report.hardware_class == PEER
    assert seen(sites.far, plain) > 0
    with pytest.raises(taxiway.TaxiwayError, match="division by zero"):
        sites.near.client.infer("slab", {"samples": [0], "seed": [1]}, locality="vault", timeout=60)
    assert seen(sites.far, "float division") == 0

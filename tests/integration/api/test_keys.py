"""The HTTP API with keys and under TLS, at a router as it ships."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

import taxiway
from api.access import Scope, digest_of
from tasks.settings import TREE
from taxiway.errors import BrokerUnavailableError, ForbiddenError, UnauthenticatedError, UnknownJobError
from tests.certificates import self_signed
from tests.keyring import authorized, keys_in, secret_of
from tests.routing import EchoDevice, eventually, router_process
from tests.waiting import BUSY
from tests.working import empty_fleet

BODY = {"inputs": [{"name": "payload", "shape": [1], "datatype": "BYTES", "data": ["a"]}], "parameters": {}}
OF_LAB = {"writer": "lab", "reader": "lab"}
MAY: dict[str, tuple[Scope, ...]] = {
    **dict.fromkeys(("lab", "shop", "busy"), ("submit", "read")),
    "writer": ("submit",),
    "reader": ("read",),
    "ops": ("admin",),
}
QUEUES = (TREE / "queues.yaml").read_text() + "\ntenants: {busy: {requests_per_second: 50}}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def interface(folder: Path, valkey_url: str) -> Iterator[str]:
    """The address of a router under TLS that knows keys, before one device; its log and certificate in `folder`."""
    certificate, key = self_signed(folder)
    (folder / "queues.yaml").write_text(QUEUES)
    settings = replace(empty_fleet(valkey_url, lasting=True), queues=folder / "queues.yaml")
    options = [*keys_in(folder / "keys.jsonl", OF_LAB, **MAY), "--tls-cert", str(certificate), "--tls-key", str(key)]
    with (
        (folder / "router.log").open("wb") as log,
        EchoDevice(settings),
        router_process(settings, log, [*options, "--log", "DEBUG"]) as router,
    ):
        yield router.http


@contextmanager
def asking(interface: str, folder: Path, name: str | None = None, secret: str | None = None) -> Iterator[httpx.Client]:
    headers = authorized(name) if name else {"authorization": f"Bearer {secret}"} if secret else {}
    trust = ssl.create_default_context(cafile=folder / "cert.pem")
    with httpx.Client(base_url=interface, headers=headers, timeout=20, verify=trust, trust_env=False) as http:
        yield http


@pytest.fixture(scope="module")
def lab(interface: str, folder: Path) -> Iterator[httpx.Client]:
    with asking(interface, folder, "lab") as http:
        yield http


@pytest.fixture(scope="module")
def shop(interface: str, folder: Path) -> Iterator[httpx.Client]:
    with asking(interface, folder, "shop") as http:
        yield http


WRONG = [None, "taxiway_wrong", "", secret_of("lab")[:-1], secret_of("lab") + "x"]


@pytest.mark.parametrize("secret", WRONG, ids=["none", "unknown", "empty", "cut", "longer"])
def test_without_a_valid_key_only_health_is_served(interface: str, folder: Path, secret: str | None) -> None:
    with asking(interface, folder, secret=secret) as http:
        refused = [http.get("/v2/models"), http.post("/v2/models/echo/infer", json=BODY), http.get("/metrics")]
        health = [http.get("/v2/health/live"), http.get("/v2/health/ready"), http.get("/docs")]
        assert "version" not in http.get("/").json()

    assert [(answer.status_code, answer.json()["code"]) for answer in refused] == [(401, "unauthenticated")] * 3
    assert {answer.headers["www-authenticate"] for answer in refused} == {"Bearer"}
    assert [answer.status_code for answer in health] == [200, 200, 200]


ANY = ("lab", "shop", "writer", "reader", "ops")


@pytest.mark.cases("call, who")
def test_a_key_may_do_what_its_scopes_say_and_nothing_else(
    interface: str, folder: Path, call: str, who: list[str]
) -> None:
    method, path = call.split()
    allowed = set()
    for name in ANY:
        with asking(interface, folder, name) as http:
            answer = http.request(method, path, json={} if method == "POST" else None)
            if answer.status_code != 403:
                allowed.add(name)
            else:
                assert answer.json()["code"] == "forbidden"

    assert allowed == {*who}


def test_a_job_is_its_tenants_alone_and_unknown_to_others(lab: httpx.Client, shop: httpx.Client) -> None:
    job = lab.post("/v2/models/echo/infer", json=BODY, headers={"prefer": "respond-async"}).headers["location"]
    ways = [("GET", job), ("GET", f"{job}/result"), ("GET", f"{job}/placement"), ("GET", f"{job}/stream")]

    reply = [shop.request(method, path) for method, path in (*ways, ("DELETE", job))]
    unknown = shop.get("/v2/jobs/00000000-0000-4000-8000-000000000000")

    assert lab.get(job, params={"wait": 10}).json()["state"] == "succeeded"
    assert lab.get(job).json()["tenant"] == "lab"
    assert lab.get(f"{job}/result").json()["outputs"][0]["data"] == ["a"]
    assert {(answer.status_code, answer.json()["code"]) for answer in (*reply, unknown)} == {(404, "unknown_job")}
    assert reply[0].json()["error"].partition("'")[0] == unknown.json()["error"].partition("'")[0]


def test_a_request_is_of_its_keys_tenant_and_may_name_no_other(lab: httpx.Client, shop: httpx.Client) -> None:
    named = BODY | {"parameters": {"tenant": "shop"}}
    refused = [lab.post(f"/v2/models/echo/{verb}", json=named) for verb in ("infer", "placement")]

    assert {(answer.status_code, answer.json()["code"]) for answer in refused} == {(403, "forbidden")}
    assert shop.post("/v2/models/echo/infer", json=named).status_code == 200


def test_a_revoked_key_is_refused_within_a_second_and_a_broken_file_changes_nothing(
    interface: str, folder: Path
) -> None:
    keys, log = folder / "keys.jsonl", folder / "router.log"
    with asking(interface, folder, "writer") as http:
        assert http.get("/v2").status_code == 200
        keys_in(keys, OF_LAB, **{name: may for name, may in MAY.items() if name != "writer"})
        assert eventually(lambda: http.get("/v2").status_code == 401, within=1 + BUSY)
        keys.write_text("{broken")
        assert eventually(lambda: http.get("/v2") and b"keys not reloaded" in log.read_bytes(), within=1 + BUSY)
        assert http.get("/v2").status_code == 401
        keys_in(keys, OF_LAB, **MAY)
        assert eventually(lambda: http.get("/v2").status_code == 200, within=1 + BUSY)


def test_the_python_client_brings_its_key_over_tls(
    interface: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BrokerUnavailableError, match="certificate"), taxiway.Client(interface) as client:
        client.models()
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "cert.pem"))
    with taxiway.Client(interface, key=secret_of("lab")) as client:
        job = client.submit("echo", "a")
        assert job.result(60).outputs["payload"] == "a"
        with pytest.raises(ForbiddenError, match="admin"):
            client.fleet()
        with pytest.raises(ForbiddenError, match="lab"):
            client.infer("echo", "a", tenant="shop")
    with taxiway.Client(interface, key=secret_of("shop")) as client, pytest.raises(UnknownJobError):
        client.job(job.id).result(1)
    with taxiway.Client(interface) as client, pytest.raises(UnauthenticatedError):
        client.models()


def test_the_python_client_asks_as_often_as_its_tenant_may_and_waits_for_the_rest(
    interface: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "cert.pem"))
    texts = [str(n) for n in range(120)]

    # Patient: as many connections as there are requests begin with a TLS handshake at once.
    with taxiway.Client(interface, key=secret_of("busy"), connect_timeout=60) as client:
        answers = [result.outputs["payload"] for result in client.map("echo", texts, deadline=100)]

    assert answers == texts


def test_no_key_stands_in_the_log_or_in_an_answer(interface: str, folder: Path, lab: httpx.Client) -> None:
    answer = [
        lab.get("/v2/jobs/none").text,
        lab.post("/v2/models/echo/infer", content=secret_of("lab")).text,
        lab.post("/v2/models/echo/infer", json=BODY | {"parameters": {secret_of("lab"): 1}}).text,
    ]
    with asking(interface, folder, secret=secret_of("lab") + "?") as http:
        answer.append(http.get(f"/v2/jobs/{secret_of('lab')}").text)

    log = (folder / "router.log").read_text()
    assert not [name for name in MAY if secret_of(name) in log + answer[0] + answer[1] + answer[3]]
    assert digest_of(secret_of("lab")) not in log


def test_an_api_with_keys_answers_by_any_name(interface: str, folder: Path) -> None:
    with asking(interface, folder, "lab") as http:
        headers = {"host": "taxiway.example.org", "origin": "https://example.org"}
        assert http.get("/v2", headers=headers).status_code == 200

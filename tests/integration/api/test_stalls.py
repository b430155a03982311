"""No request holds a router's event loop for over 100 ms, whatever is in its body: measured in the router itself."""

import json
from collections.abc import Callable, Iterator

import httpx
import pytest
import redis

from tasks.settings import Settings
from taxiway.contract.job import FINAL
from taxiway.contract.keys import ARRIVALS, INFER
from taxiway.contract.request import new_id
from taxiway.contract.wire import encode_envelope, task_envelope
from tests.routing import EchoDevice, eventually
from tests.ticking import LONGEST, Stalls, ticking_router
from tests.working import empty_fleet

pytestmark = pytest.mark.slow

FULL = 16 * 2**20 - 2**12


@pytest.fixture(scope="module")
def fleet(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Settings, httpx.Client, Stalls]]:
    """Settings, the HTTP API and the stalls of a router before one device."""
    settings = empty_fleet(valkey_url, lasting=True)
    with (
        EchoDevice(settings),
        ticking_router(settings, tmp_path_factory.mktemp("stalls")) as (router, stalls),
        httpx.Client(base_url=router.http, timeout=60, trust_env=False) as http,
    ):
        eventually(lambda: http.get("/v2/health/ready").status_code == 200)
        yield settings, http, stalls


def tensor(data: bytes, datatype: str = "BYTES") -> bytes:
    text = b'{"inputs":[{"name":"payload","shape":[%d],"datatype":"%s","data":[%s]}]}'
    return text % (data.count(b",") + 1, datatype.encode(), data)


def patient(text: bytes) -> bytes:
    """A request with one text that is answered however busy the machine is."""
    return tensor(b'"%s"' % text).removesuffix(b"}") + b',"parameters":{"deadline":60}}'


def many(element: bytes, size: int = FULL) -> bytes:
    return b",".join([element] * (size // (len(element) + 1)))


def raw(shape: list[int], content: bytes) -> tuple[bytes, dict[str, str]]:
    head = {"name": "payload", "shape": shape, "datatype": "BYTES", "parameters": {"binary_data_size": len(content)}}
    text = json.dumps({"inputs": [head]}).encode()
    return text + content, {"inference-header-content-length": str(len(text))}


INFERS: dict[str, Callable[[], tuple[bytes, dict[str, str], int]]] = {
    "a shape of 90,000 numbers": lambda: (*raw([10**17] * 90_000, bytes(4)), 400),
    "a shape whose product no machine word holds": lambda: (*raw([2**62, 2**62], bytes(4)), 400),
    "lengths of thousands of digits": lambda: (*raw([10**4200, 10**4200], bytes(4)), 400),
    "4 million empty elements": lambda: (*raw([FULL // 4], bytes(FULL // 4 * 4)), 413),
    "as many elements as may be": lambda: (*raw([500_000], bytes(4 * 500_000)), 413),
    "numbers over the limit": lambda: (tensor(many(b"0.12345678901234567"), "FP32"), {}, 413),
    "as many numbers as may be": lambda: (tensor(many(b"0.12345678901234567", 499_000 * 20), "FP32"), {}, 400),
    "as many hard numbers as may be": lambda: (tensor(many(b"9007199254740993.0", 499_000 * 19), "FP64"), {}, 400),
    "extreme numbers": lambda: (tensor(many(b"1e308"), "FP64"), {}, 413),
    "numbers of many digits": lambda: (tensor(many(b"9" * 4000), "FP64"), {}, 413),
    "as many texts as may be": lambda: (tensor(many(b'"a"', 99_000 * 4)), {}, 413),
    "as many lists as may be": lambda: (tensor(many(b"[]", 33_000 * 3)), {}, 413),
    "as many mappings as may be": lambda: (tensor(many(b'{"":0}', 33_000 * 7)), {}, 413),
    "many hard parameters": lambda: (b'{"inputs":[],"parameters":{"a":[%s]}}' % many(b"1e23", 495_000), {}, 400),
    "one text of all bytes": lambda: (patient(b"a" * FULL), {}, 200),
    "one text of escapes": lambda: (patient(b"\\u00e9" * (FULL // 6)), {}, 200),
    "an unknown field of all bytes": lambda: (b'{"%s":1}' % (b"a" * FULL), {}, 400),
    "parameters over the limit": lambda: (b'{"inputs":[],"parameters":{%s}}' % many(b'"a":1'), {}, 413),
}
"""What is sent, made when it is: bodies of up to 16 MiB."""


@pytest.mark.parametrize("what", INFERS)
def test_no_infer_request_holds_the_event_loop(fleet: tuple[Settings, httpx.Client, Stalls], what: str) -> None:
    _, http, stalls = fleet
    content, headers, status = INFERS[what]()
    answers: list[httpx.Response] = []

    def ask() -> bool:
        """Ask again while a busy store is not ready for it, as clients do."""
        answers[:] = [http.post("/v2/models/echo/infer", content=content, headers=headers)]
        return answers[0].status_code != 503

    stall = stalls.least(lambda: eventually(ask))

    assert stall < LONGEST
    assert answers[0].status_code == status
    assert status == 200 or len(answers[0].text) < 1000


ARRIVING: dict[str, Callable[[], bytes]] = {
    "numbers over the limit": lambda: b'[[],{"model":"echo","inputs":[%s]},{}]' % many(b"1"),
    "extreme numbers": lambda: b'[[],{"model":"echo","inputs":[%s]},{}]' % many(b"1e308"),
    "as many lists as may be": lambda: b'[[],{"model":"echo","inputs":[%s]},{}]' % many(b"[]", 166_000 * 3),
    "one text of all bytes": lambda: b'[[],{"model":"echo","inputs":"%s"},{}]' % (b"a" * FULL),
}


@pytest.mark.parametrize("what", ARRIVING)
def test_no_arrival_holds_the_event_loop(fleet: tuple[Settings, httpx.Client, Stalls], what: str) -> None:
    settings, http, stalls = fleet

    def arrive() -> None:
        job, body = new_id(), ARRIVING[what]()
        broker.lpush(ARRIVALS, encode_envelope(task_envelope(INFER, job, body, header={}, origin="test")))
        assert eventually(lambda: http.get(f"/v2/jobs/{job}").json().get("state") in FINAL)

    with redis.Redis.from_url(settings.broker, socket_timeout=60) as broker:
        assert stalls.least(arrive) < LONGEST

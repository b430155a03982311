"""What clients of other servers expect of the HTTP door: compressed bodies, Triton's endpoints, pages."""

import gzip
import json
import secrets

import httpx
import pytest

from tasks.embedded import EmbeddedValkey
from tasks.settings import settings_from
from tests.routing import EchoDevice, eventually, router_process

ROW = {"name": "payload", "shape": [1], "datatype": "BYTES", "data": ["a"]}
BODY = {"inputs": [ROW], "parameters": {"deadline": 30}}


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    """The HTTP door of a router before one device."""
    with EmbeddedValkey(tmp_path_factory.mktemp("features")) as server:
        settings = settings_from({"TAXIWAY_BROKER": server.url, "TAXIWAY_SECRET": secrets.token_hex(32)})
        with (
            EchoDevice(settings),
            router_process(settings) as router,
            httpx.Client(base_url=router.http, timeout=30, trust_env=False) as http,
        ):
            eventually(lambda: http.get("/v2/models/echo/ready").status_code == 200)
            yield http


def post(http, path, content, coding, **headers):
    return http.post(path, content=content, headers={"content-encoding": coding, **headers})


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP"])
def test_a_compressed_body_is_read_as_one_that_is_not(http, coding):
    content = gzip.compress(json.dumps(BODY).encode())

    answers = [post(http, "/v2/models/echo/infer", content, coding)]
    answers.append(post(http, "/v2/models/echo/infer", iter([content[:9], content[9:]]), coding))

    assert [answer.json()["outputs"][0]["data"] for answer in answers] == [["a"]] * 2
    assert post(http, "/v2/models/echo/placement", content, coding).json()["model"] == "echo:1"


def test_raw_tensors_may_be_compressed_with_their_json(http):
    raw = b"\x03\x00\x00\x00abc"
    head = {"name": "payload", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    text = json.dumps({"inputs": [head]}).encode()
    headers = {"inference-header-content-length": str(len(text))}

    answer = post(http, "/v2/models/echo/infer", gzip.compress(text + raw), "gzip", **headers)

    assert answer.json()["outputs"][0]["data"] == ["YWJj"]


@pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "gzip, gzip"])
def test_another_encoding_is_refused_with_those_that_are_read(http, coding):
    answers = [post(http, f"/v2/models/echo/{verb}", b"x" * 100_000, coding) for verb in ("infer", "placement")]

    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_encoding")
        assert answer.headers["accept-encoding"] == "gzip"


def test_a_body_that_inflates_beyond_the_limit_is_refused(http):
    answer = post(http, "/v2/models/echo/infer", gzip.compress(bytes(2**25)), "gzip")

    assert (answer.status_code, answer.json()["details"]["limit"]) == (413, "payload")


def test_a_body_that_is_no_gzip_is_refused_by_name(http):
    answer = post(http, "/v2/models/echo/infer", b"not gzip", "gzip")

    assert (answer.status_code, answer.json()["details"]["field"]) == (400, "body")

"""What clients of other servers expect of the HTTP API: compressed bodies, Triton's endpoints, pages."""

import gzip
import json
import zlib
from collections.abc import Iterator

import httpx
import pytest

from tests.browser import CHROMIUM, opened

ROW = {"name": "payload", "shape": [1], "datatype": "BYTES", "data": ["a"]}
BODY = {"inputs": [ROW], "parameters": {"deadline": 30}}


def post(
    http: httpx.Client, path: str, content: bytes | Iterator[bytes], coding: str, **headers: str
) -> httpx.Response:
    return http.post(path, content=content, headers={"content-encoding": coding, **headers})


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP", "deflate"])
def test_a_compressed_body_is_read_as_one_that_is_not(http: httpx.Client, coding: str) -> None:
    plain = json.dumps(BODY).encode()
    content = zlib.compress(plain) if coding == "deflate" else gzip.compress(plain)

    answers = [post(http, "/v2/models/echo/infer", content, coding)]
    answers.append(post(http, "/v2/models/echo/infer", iter([content[:9], content[9:]]), coding))

    assert [answer.json()["outputs"][0]["data"] for answer in answers] == [["a"]] * 2
    assert post(http, "/v2/models/echo/placement", content, coding).json()["model"] == "echo:1"


def test_raw_tensors_may_be_compressed_with_their_json(http: httpx.Client) -> None:
    raw = b"\x03\x00\x00\x00abc"
    head = {"name": "payload", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    text = json.dumps({"inputs": [head]}).encode()
    headers = {"inference-header-content-length": str(len(text))}

    answer = post(http, "/v2/models/echo/infer", gzip.compress(text + raw), "gzip", **headers)

    assert answer.json()["outputs"][0]["data"] == ["YWJj"]


@pytest.mark.parametrize("coding", ["br", "compress", "zstd", "gzip, gzip"])
def test_another_encoding_is_refused_with_those_that_are_read(http: httpx.Client, coding: str) -> None:
    answers = [post(http, f"/v2/models/echo/{verb}", b"x" * 100_000, coding) for verb in ("infer", "placement")]

    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_encoding")
        assert answer.headers["accept-encoding"] == "gzip, deflate"


def test_the_index_has_every_version_of_every_model(http: httpx.Client) -> None:
    listed = http.post("/v2/repository/index").json()

    assert {(m["name"], m["version"]) for m in listed} >= {("echo", "1"), ("sentiment", "1")}
    assert {m["name"] for m in http.get("/v2/models").json()["models"]} == {m["name"] for m in listed}
    assert {"name": "echo", "version": "1", "state": "READY"} in listed


def test_the_root_says_what_this_is_in_json_and_in_html(http: httpx.Client) -> None:
    answer = http.get("/").json()
    page = http.get("/", headers={"accept": "text/html,*/*"})

    assert answer["name"] == "taxiway" and answer["version"] == http.get("/v2").json()["version"]
    assert all(http.get(path).status_code == 200 for path in answer["links"].values())
    assert page.headers["content-type"].startswith("text/html")
    assert all(f'href="{path}"' in page.text for path in answer["links"].values())


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_is_small_and_asks_no_other_host(http: httpx.Client, path: str) -> None:
    page = http.get(path, headers={"accept": "text/html"})

    assert (page.status_code, page.headers["content-type"].partition(";")[0]) == (200, "text/html")
    assert len(page.content) < 100_000
    assert "//" not in page.text.replace("<!doctype html>", "").replace("http-equiv", "")
    assert "connect-src 'self'" in page.headers["content-security-policy"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
async def test_a_browser_shows_every_endpoint_of_the_api(http: httpx.Client) -> None:
    paths = http.get("/schema/openapi.json").json()["paths"]
    async with opened(f"{http.base_url}/docs") as page:
        await page.until(f"document.querySelectorAll('details').length === {sum(map(len, paths.values()))}")
        shown = await page.value("document.body.outerHTML")

    assert all(f"<code>{path}</code>" in shown for path in paths)
    assert "[object Object]" not in shown

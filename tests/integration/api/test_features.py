"""What clients of other servers expect of the HTTP API: compressed bodies, Triton's endpoints, pages."""

import httpx
import pytest

from tests.browser import CHROMIUM, opened

ROW = {"name": "payload", "shape": [1], "datatype": "BYTES", "data": ["a"]}
BODY = {"inputs": [ROW], "parameters": {"deadline": 30}}


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br"])
def test_a_compressed_body_is_refused_with_what_is_read(http: httpx.Client, coding: str) -> None:
    for verb in ("infer", "placement"):
        headers = {"content-encoding": coding}
        answer = http.post(f"/v2/models/echo/{verb}", content=b"x" * 100_000, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_encoding")
        assert answer.headers["accept-encoding"] == "identity"


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

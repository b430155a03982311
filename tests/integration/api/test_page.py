"""The page at `/` in headless Chromium: charts of the last minutes, problems, a job's path, dead letters, keys."""

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import redis

import taxiway
from local.embedded import EmbeddedValkey
from router.upkeep.timeline import EVERY, ClassSample, FleetSample, MovedSample
from tasks.history import ServiceLatency, slice_of
from tasks.settings import TREE, Settings, settings_from
from taxiway.contract.keys import ARRIVALS, TIMELINE
from tests.browser import CHROMIUM, Page, opened
from tests.keyring import keys_in, secret_of
from tests.routing import HTTP, EchoDevice, eventually, router_process

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")

AXE = "axe-core@4.14.1"
"""What judges whether a page can be used by everybody; MPL-2.0, and only fetched for this test."""

SCREENSHOTS = TREE / "build" / "page"
"""Where the tests leave pictures of the page, to look at."""

CLASSES = "[...document.querySelectorAll('#classes h3')].map((title) => title.textContent)"
CELLS = "[...document.querySelectorAll('#{} td')].map((cell) => cell.textContent)"
DRAWN = "[...document.querySelectorAll('#charts svg')].map((chart) => chart.getAttribute('aria-label'))"
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@contextmanager
def interface(folder: Path, *options: str) -> Iterator[tuple[str, Settings]]:
    with EmbeddedValkey(folder / "valkey") as server:
        settings = settings_from({"TAXIWAY_BROKER": server.url, "TAXIWAY_SECRET": secrets.token_hex(32)})
        device = EchoDevice(settings)
        device.unavailable = {"embed:1/torch": "torch is broken"}
        with device, router_process(settings, options=["--files", str(folder), *options]) as router:
            eventually(lambda: HTTP.get(f"{router.http}/v2/health/ready").is_success)
            yield router.http, settings


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script of axe-core."""
    folder = tmp_path_factory.mktemp("axe")
    npm = shutil.which("npm")
    packed = npm and subprocess.run(
        [npm, "pack", "--silent", "--prefer-offline", AXE], cwd=folder, capture_output=True, timeout=120
    )
    if not packed or packed.returncode:
        assert "CI" not in os.environ, "npm cannot fetch axe-core"
        pytest.skip("needs npm, and axe-core from it")
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as members:
        member = members.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def a_sample(now: float, at: float) -> FleetSample:
    """What a leader may have stored: a queue that grew and was helped out by another class, under two plans."""
    depth = max(0, round(40 - abs(at - now + 500) / 4))
    begin = slice_of(at)
    answered = ServiceLatency(
        begin=begin, service="standard", jobs=60, late=depth // 10, median=0.02, slowest=0.05 + depth / 8, deadline=5.0
    )
    return FleetSample(
        at=at,
        held=0,
        plan=7 if at < now - 500 else 8,
        classes={
            "cpu.batch": ClassSample(depth, min(1.0, 0.1 + depth / 30), 2, 0.1),
            "gpu.realtime": ClassSample(depth // 8, 0.2 + depth / 90, 1, 0.71),
        },
        moves=(MovedSample("cpu.batch", "gpu.realtime", "rescue", depth // 3),) if depth > 20 else (),
        services=(answered,) if at - begin < EVERY else (),
    )


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A router's address, and a job that ended there. One message is dead, and a leader sampled until a minute ago."""
    with interface(tmp_path_factory.mktemp("fleet")) as (url, settings):
        with taxiway.Client(url) as client:
            job = client.submit("echo", "hello")
            job.result(timeout=60)
        with redis.Redis.from_url(settings.broker) as broker:
            broker.lpush(ARRIVALS, b"no message")
            now = HTTP.get(f"{url}/v2/fleet").json()["now"]
            broker.rpush(TIMELINE, *(msgspec.json.encode(a_sample(now, now - age)) for age in range(60, 900, 5)))
        eventually(lambda: HTTP.get(f"{url}/v2/dead").json()["letters"])
        yield url, job.id


async def drawn(page: Page) -> list[str]:
    """What the charts say, once all are there."""
    return list(await page.until(f"document.querySelectorAll('#services svg').length && {DRAWN}"))


async def test_the_page_draws_the_last_fifteen_minutes_and_again_after_a_reload(fleet: tuple[str, str]) -> None:
    async with opened(fleet[0]) as page:
        charts = await drawn(page)
        samples = HTTP.get(f"{fleet[0]}/v2/fleet/timeline").json()["samples"]
        moved = sum(jobs for one in samples for *_, jobs in one["moves"])
        text = "; ".join(charts)
        assert "busy now; at most 40 waiting in 15 minutes" in text
        assert "standard: latency against deadline; " in text
        assert "Dollars an hour: $0." in text
        assert f"Moves and plans: {moved} jobs moved in 15 minutes" in text
        marks = "['.came', '.stem', '.plan', '.bar', '.late', '.deadline', '.solid']"
        counts = f"{marks}.map((kind) => document.querySelectorAll('#charts svg ' + kind).length)"
        before = await page.value(counts)
        assert min(before) >= 2
        await page.call("Page.reload")
        await drawn(page)
        assert (await page.value(counts))[:2] == before[:2]  # the moves: the last minute adds to the others
        assert page.errors == []


async def test_the_page_says_what_is_wrong_and_what_to_do_first(fleet: tuple[str, str]) -> None:
    async with opened(fleet[0]) as page:
        await page.until("!document.getElementById('main').hidden")
        assert (await page.until(f"{CLASSES}.length && {CLASSES}"))[0] == "cpu.batch"
        shown = "document.getElementById('problems').textContent"
        said = await page.until(f"{shown}.includes('dead letters') && {shown}")
        assert said.startswith("2 things need attention")
        assert "embed:1/torch: unavailable on" in said
        assert "torch is broken" in said
        assert "What to do: taxiway dead list, then replay or drop them" in said
        before = await page.value("document.getElementById('state').textContent")
        await page.until(f"document.getElementById('state').textContent !== {json.dumps(before)}")
        assert any("Replay" in text for text in await page.until(f"{CELLS.format('dead-table')}"))
        await page.value("document.querySelector('#dead button:last-of-type').click()")
        assert page.errors == []


async def test_the_keyboard_reads_the_charts_and_finds_a_job_s_path(fleet: tuple[str, str]) -> None:
    async def press(page: Page, key: str) -> None:
        event = f"new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}})"
        await page.value(f"document.activeElement.dispatchEvent({event})")

    async with opened(fleet[0]) as page:
        await drawn(page)
        await page.value("document.getElementById('charts').focus()")
        await press(page, "ArrowLeft")
        assert str(await page.value("document.getElementById('cursor').textContent")).startswith("at ")
        read = "document.querySelector('#class-cpu\\\\.batch .then').textContent"
        assert " waiting, " in await page.value(read)
        await press(page, "Home")
        assert await page.value(read) == "0 waiting, 10\u00a0% busy, 2 devices"
        await press(page, "Escape")
        assert await page.value("document.getElementById('cursor').textContent") == ""
        await press(page, "/")
        assert await page.value("document.activeElement.name") == "job"
        value = f"document.activeElement.value = '{fleet[1]}'"
        await page.value(f"{value}; document.getElementById('job').requestSubmit()")
        path = "[...document.querySelectorAll('ol.path li.there')].map((step) => step.firstChild.textContent)"
        assert await page.until(f"{path}.length && {path}") == ["accepted", "placed", "began", "succeeded"]
        said = await page.until("document.querySelector('#flight svg')?.getAttribute('aria-label')")
        assert "happened" in said and "run " in said
        assert "chosen" in await page.value(CELLS.format("flight"))
        assert page.errors == []


@pytest.mark.cases("name, width, dark")
async def test_everybody_can_use_the_page_light_and_dark_from_phone_to_wall(
    fleet: tuple[str, str], axe: str, name: str, width: int, dark: bool
) -> None:
    async with opened(f"{fleet[0]}/#job={fleet[1]}", dark=dark) as page:
        await page.resize(width)
        await drawn(page)
        await page.until("!!document.querySelector('#flight svg')")
        light = await page.value("getComputedStyle(document.body).backgroundColor")
        assert (light == "rgb(15, 18, 22)") is dark
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        (SCREENSHOTS / f"{name}.png").write_bytes(await page.screenshot())
        await page.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert await page.value(TOO_WIDE) == 0
        await page.value(f"{axe}; 0")
        wrong = "axe.run().then(({violations}) => violations.map(({id, impact}) => [id, impact]))"
        found = await page.value(wrong)
        assert [one for one in found if one[1] in ("serious", "critical")] == []
        assert page.errors == []


def test_the_page_asks_for_a_key_and_shows_nothing_without_it(tmp_path: Path) -> None:
    secret = secret_of("ops")

    async def look(url: str) -> None:
        async with opened(url) as page:
            await page.until("!document.getElementById('key').hidden")
            assert await page.value("document.getElementById('main').hidden")
            assert await page.value(CLASSES) == []
            await page.value(f"document.querySelector('#key input').value = '{secret}'")
            await page.value("document.querySelector('#key').requestSubmit()")
            assert "cpu.batch" in await page.until(f"{CLASSES}.length && {CLASSES}")

    with interface(tmp_path, *keys_in(tmp_path / "keys", ops=("read", "admin"))) as (url, _):
        asyncio.run(look(url))


def test_the_page_is_small_runs_no_code_but_its_own_and_names_no_other_host(fleet: tuple[str, str]) -> None:
    page = HTTP.get(fleet[0], headers={"accept": "text/html"})
    names = [path.name for path in (TREE / "api" / "pages").iterdir() if path.suffix in (".css", ".js")]
    files = {name: HTTP.get(f"{fleet[0]}/page/{name}") for name in names}

    assert all(one.is_success for one in files.values())
    assert len(page.content) + sum(len(one.content) for one in files.values()) < 100_000
    for text in (page.text, *(one.text for one in files.values())):
        assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "<script>" not in page.text
    assert HTTP.get(f"{fleet[0]}/page/endpoints.py").status_code == 404

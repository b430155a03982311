"""The page at `/` in headless Chromium: the fleet as it changes, a job's flight path, batches, dead letters, keys."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import redis

import taxiway
from api.access import Key, digest_of
from api.keys_file import write_keys
from local.embedded import EmbeddedValkey
from tasks.settings import Settings, settings_from
from taxiway.contract.keys import ARRIVALS
from tests.browser import CHROMIUM, opened
from tests.routing import EchoDevice, eventually, router_process

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")

HELD = "[...document.querySelectorAll('#{} td')].map((cell) => cell.textContent)"


@contextmanager
def interface(folder: Path, *options: str) -> Iterator[tuple[str, Settings]]:
    with EmbeddedValkey(folder / "valkey") as server:
        settings = settings_from({"TAXIWAY_BROKER": server.url, "TAXIWAY_SECRET": secrets.token_hex(32)})
        device = EchoDevice(settings)
        device.unavailable = {"embed:1/torch": "torch is broken"}
        with device, router_process(settings, options=["--files", str(folder), *options]) as router:
            eventually(lambda: httpx.get(f"{router.http}/v2/health/ready", trust_env=False).is_success)
            yield router.http, settings


def test_the_page_shows_the_fleet_a_job_and_replays_a_dead_letter(tmp_path: Path) -> None:
    async def look(url: str, job: str) -> None:
        async with opened(url) as page:
            await page.until("!document.getElementById('main').hidden")
            assert "cpu.batch" in await page.until(HELD.format("classes"))
            problems = await page.until("document.getElementById('problems').textContent")
            assert "embed:1/torch: unavailable on" in problems and "torch is broken" in problems
            used = "getComputedStyle(document.querySelector('#classes meter').parentElement).whiteSpace"
            assert await page.value(used) == "nowrap"
            before = await page.value("document.getElementById('state').textContent")
            await page.until(f"document.getElementById('state').textContent !== {json.dumps(before)}")
            await page.value("document.dispatchEvent(new KeyboardEvent('keydown', {key: '/', bubbles: true}))")
            assert await page.value("document.activeElement.name") == "job"
            await page.value(f"document.activeElement.value = '{job}'; document.getElementById('job').requestSubmit()")
            path = "[...document.querySelectorAll('ol.path li.there')].map((step) => step.firstChild.textContent)"
            assert await page.until(f"{path}.length && {path}") == ["accepted", "placed", "claimed", "succeeded"]
            assert "chosen" in await page.value(HELD.format("flight"))
            assert any("Replay" in text for text in await page.until(f"{HELD.format('dead')}"))
            problems = "document.getElementById('problems').textContent"
            shown = await page.until(f"{problems}.includes('dead letters: ') && {problems}")
            assert shown.startswith("2 things need attention")
            await page.call(
                "Emulation.setDeviceMetricsOverride", width=390, height=900, deviceScaleFactor=1, mobile=True
            )
            right = (
                "Math.max(...[...document.querySelectorAll('td')].map((cell) => cell.getBoundingClientRect().right))"
            )
            assert await page.value(right) <= 390
            await page.value("document.querySelector('#dead button:last-of-type').click()")
            assert page.errors == []

    with interface(tmp_path) as (url, settings):
        with taxiway.Client(url) as client:
            job = client.submit("echo", "hello")
            job.result(timeout=60)
        with redis.Redis.from_url(settings.broker) as broker:
            broker.lpush(ARRIVALS, b"no message")
        eventually(lambda: httpx.get(f"{url}/v2/dead", trust_env=False).json()["letters"])
        asyncio.run(look(url, job.id))


def test_the_page_asks_for_a_key_and_shows_nothing_without_it(tmp_path: Path) -> None:
    secret = f"taxiway_{secrets.token_urlsafe(32)}"
    write_keys(tmp_path / "keys", [Key(id="ops", digest=digest_of(secret), tenant="ops", scopes=("read", "admin"))])

    async def look(url: str) -> None:
        async with opened(url) as page:
            await page.until("!document.getElementById('key').hidden")
            assert await page.value("document.getElementById('main').hidden")
            assert await page.value(HELD.format("classes")) == []
            await page.value(f"document.querySelector('#key input').value = '{secret}'")
            await page.value("document.querySelector('#key').requestSubmit()")
            assert "cpu.batch" in await page.until(f"{HELD.format('classes')}.length && {HELD.format('classes')}")

    with interface(tmp_path, "--keys", str(tmp_path / "keys")) as (url, _):
        asyncio.run(look(url))

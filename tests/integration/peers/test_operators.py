"""What operators see of other sites: on the page, in `taxiway top`, `taxiway status` and `taxiway doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from local.doctor import check_endpoints
from tests.browser import CHROMIUM, opened
from tests.command_line import CommandLine
from tests.integration.api.test_page import CELLS, SCREENSHOTS, TOO_WIDE
from tests.routing import eventually
from tests.sites import NEAR, TwoSites, two_sites


@pytest.fixture(scope="module")
def sites(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoSites]:
    with two_sites(valkey_url, tmp_path_factory.mktemp("sites"), "cpu.batch", lasting=True) as opened_sites:
        yield opened_sites


def test_the_command_line_lists_the_sites(sites: TwoSites) -> None:
    said = CommandLine().succeed("status", "--url", sites.near.url).stdout
    assert [line for line in said.splitlines() if line.split()[:1] == ["cloud"] and "echo, slab" in line]


def test_the_doctor_finds_out_what_another_fleet_offers(sites: TwoSites, tmp_path: Path) -> None:
    def found(url: str) -> list[tuple[str, str]]:
        (tmp_path / "queues.yaml").write_text(NEAR.replace("URL", url))
        variables = {"TAXIWAY_QUEUES": str(tmp_path / "queues.yaml"), "TAXIWAY_MODELS": str(sites.far.settings.models)}
        return [(one.subject, one.value) for one in check_endpoints(variables)]

    eventually(lambda: (f"endpoint cloud {sites.far.url}", "answers, and lists echo, slab") in found(sites.far.url))
    ((subject, value),) = found("http://127.0.0.1:9")
    assert ("127.0.0.1:9" in subject, "cannot connect to" in value) == (True, True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize(
    ("name", "width", "dark"), [("light", 1280, False), ("dark", 1280, True), ("phone", 390, False)]
)
async def test_the_page_shows_the_sites_and_why_one_is_silent(
    sites: TwoSites, name: str, width: int, dark: bool
) -> None:
    cells = CELLS.format("sites-table")
    async with opened(sites.near.url, dark=dark) as page:
        await page.resize(width)
        await page.until(f"{cells}[0] === 'cloud' && {cells}[3] === 'echo, slab'")
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        (SCREENSHOTS / f"sites-{name}.png").write_bytes(await page.screenshot())
        sites.line.pull()
        try:
            await page.until(f"{cells}[2].startsWith('silent: ') && {cells}[3] === 'nothing'")
            (SCREENSHOTS / f"sites-{name}-silent.png").write_bytes(await page.screenshot())
            assert await page.value(TOO_WIDE) == 0
        finally:
            sites.line.plug()
        assert page.errors == []
    eventually(sites.offered)

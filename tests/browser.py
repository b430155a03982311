"""A page in headless Chromium, over its DevTools protocol."""

from __future__ import annotations

import asyncio
import atexit
import base64
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp

from tests.waiting import until

CHROMIUM = shutil.which("chromium")


class Page:
    """One page, or the browser itself."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._calls = 0
        self.errors: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": parameters})
        while True:
            stated = await self._socket.receive_json(timeout=60)
            if stated.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(stated["params"]["exceptionDetails"]))
            if stated.get("id") == self._calls:
                return dict(stated["result"])

    async def value(self, expression: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return found["result"].get("value")

    async def until(self, expression: str, *, within: float = 60.0) -> Any:
        """The expression's first true value."""
        end = asyncio.get_running_loop().time() + within
        while not (found := await self.value(expression)):
            assert asyncio.get_running_loop().time() < end, f"{expression} is not true; {self.errors}"
            await asyncio.sleep(0.05)
        return found

    async def resize(self, width: int, height: int = 1000) -> None:
        """Be as wide as that, as a phone is if it is narrow."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        await self.call("Emulation.setDeviceMetricsOverride", **sizes)

    async def screenshot(self) -> bytes:
        """The whole page, however long it is."""
        taken = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(taken["data"])


@cache
def _browser() -> tuple[str, str]:
    """The DevTools address of a browser that ends with this process, and the path of the browser itself there."""
    assert CHROMIUM is not None
    profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
    process = subprocess.Popen(
        [CHROMIUM, *options, f"--user-data-dir={profile.name}", "about:blank"], stderr=subprocess.DEVNULL
    )

    def stop() -> None:
        process.kill()
        process.wait()
        profile.cleanup()

    atexit.register(stop)
    listens = Path(profile.name) / "DevToolsActivePort"
    assert until(lambda: listens.exists() and listens.read_text().count("\n") == 1), "Chromium does not start"
    port, path = listens.read_text().split("\n")
    return f"http://127.0.0.1:{port}", path


@asynccontextmanager
async def opened(url: str, *, dark: bool = False) -> AsyncIterator[Page]:
    """A page at this address, with a profile of its own, as wide as a desk's screen."""
    devtools, path = await asyncio.to_thread(_browser)
    async with aiohttp.ClientSession(devtools) as session, session.ws_connect(path) as whole:
        browser = Page(whole)
        profile = await browser.call("Target.createBrowserContext")
        try:
            target = await browser.call("Target.createTarget", url="about:blank", **profile)
            async with session.ws_connect(f"/devtools/page/{target['targetId']}", max_msg_size=2**26) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime"):
                    await page.call(f"{domain}.enable")
                scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                await page.call("Emulation.setEmulatedMedia", features=[scheme])
                await page.resize(1280)
                await page.call("Page.navigate", url=url)
                yield page
        finally:
            await browser.call("Target.disposeBrowserContext", **profile)

"""A page in headless Chromium, over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium")


class Page:
    """One page."""

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


@asynccontextmanager
async def opened(url: str, *, width: int = 1280, height: int = 1000, dark: bool = False) -> AsyncIterator[Page]:
    """A page at this address."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        size = [f"--window-size={width},{height}", "--remote-debugging-port=0"]
        process = subprocess.Popen([CHROMIUM, *options, *size, "about:blank"], stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            port = next(found[1] for line in lines if (found := re.search(r"ws://127.0.0.1:(\d+)/", line)))
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    (target,) = [one for one in await answer.json() if one["type"] == "page"]
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=2**26) as socket:
                    page = Page(socket)
                    for domain in ("Page", "Runtime"):
                        await page.call(f"{domain}.enable")
                    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                    await page.call("Emulation.setEmulatedMedia", features=[scheme])
                    await page.call("Page.navigate", url=url)
                    yield page
        finally:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()

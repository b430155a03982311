"""One request over HTTP, from code that has no event loop."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from http import HTTPStatus

import aiohttp


def ask(url: str, *, method: str = "GET", key: str = "", timeout: float) -> bytes | None:
    """The body of the answer to a request without one, never by a proxy; None without a 200 in `timeout` seconds.

    `key` is the API key, if the API requires one.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with suppress(aiohttp.ClientError, TimeoutError):
        return asyncio.run(_ask(url, method, headers, aiohttp.ClientTimeout(timeout)))
    return None


async def _ask(url: str, method: str, headers: dict[str, str], timeout: aiohttp.ClientTimeout) -> bytes | None:
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.request(method, url, headers=headers, allow_redirects=False) as answer,
    ):
        return await answer.read() if answer.status == HTTPStatus.OK else None

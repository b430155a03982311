"""One request over HTTP, from code that has no event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp

NO_ANSWER = (aiohttp.ClientError, TimeoutError)
"""What aiohttp raises for a request that has no answer."""


@dataclass(frozen=True, slots=True)
class WebAnswer:
    """A whole answer."""

    status: int
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the status is 200."""
        return self.status == HTTPStatus.OK


def ask(url: str, *, method: str = "GET", headers: Mapping[str, str] = {}, timeout: float) -> WebAnswer:
    """The answer to a request without a body within `timeout` seconds, never by a proxy. Raises `NO_ANSWER`."""
    return asyncio.run(_ask(url, method, headers, aiohttp.ClientTimeout(timeout)))


def answers(url: str, *, timeout: float) -> bool:
    """Whether a GET is answered with 200 within `timeout` seconds."""
    with suppress(*NO_ANSWER):
        return ask(url, timeout=timeout).ok
    return False


async def _ask(url: str, method: str, headers: Mapping[str, str], timeout: aiohttp.ClientTimeout) -> WebAnswer:
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.request(method, url, headers=headers, allow_redirects=False) as answer,
    ):
        return WebAnswer(answer.status, await answer.read())

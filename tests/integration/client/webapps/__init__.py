"""Web applications with taxiway's clients at module level, one per framework.

Each answers `GET /SERVICES/VIEW?text=…` with the echo of the text; `ADDRESSES` in the environment has the fleet's.
"""

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

import taxiway


def clients() -> Mapping[str, taxiway.Client]:
    """A synchronous client for each interface."""
    return {urlsplit(url).scheme: taxiway.Client(url) for url in os.environ["ADDRESSES"].split()}


def async_clients() -> Mapping[str, taxiway.AsyncClient]:
    """The same for asyncio."""
    return {urlsplit(url).scheme: taxiway.AsyncClient(url) for url in os.environ["ADDRESSES"].split()}

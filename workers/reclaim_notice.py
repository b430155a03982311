"""Watches for a reclaim notice: a signal, a file that appears, or a cloud's metadata address."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import httpx

from tasks.topology import Notice

logger = logging.getLogger(__name__)

SIGNAL = signal.SIGUSR2
"""The signal for a notice. Celery uses TERM, INT, QUIT, HUP and USR1; this one only if CELERY_RDBSIG is set."""

LOOK = 1.0
"""Seconds between polls, the shortest that clouds recommend (Azure: once a second; AWS: every five seconds)."""

_ANSWER = 2.0  # time-out in seconds of a metadata address, which is local to the machine
_TOKEN_FOR = "21600"  # seconds; AWS's maximum token lifetime


class NoticeWatch:
    """Polls for a notice until stopped.

    Args:
        leave: called with the seconds until the machine is gone, at every poll that finds a notice.
    """

    def __init__(self, notice: Notice, leave: Callable[[float], None]) -> None:
        self._notice = notice
        self._leave = leave
        self._wake = threading.Event()
        self._signals = 0
        self._stopped = False
        self._address = Address(notice) if notice.url is not None else None

    def signal(self) -> None:
        """Count a signal; a second one means to exit at once. Called by the signal handler."""
        self._signals += 1
        self._wake.set()

    def stop(self) -> None:
        """End `run`. Any thread may call it."""
        self._stopped = True
        self._wake.set()

    def run(self) -> None:
        """Poll every `LOOK` seconds, and at once after a signal."""
        while not self._stopped:
            self._wake.clear()
            grace = self.look()
            if grace is not None:
                self._leave(grace)
            self._wake.wait(LOOK)

    def look(self) -> float | None:
        """Seconds until the machine is gone; None without a notice."""
        texts = (self._file(), self._address.text() if self._address is not None else None)
        graces = [grace_of(text, self._notice, time.time()) for text in texts if text is not None]
        if self._signals:
            graces.append(self._notice.grace if self._signals == 1 else 0.0)
        return min((grace for grace in graces if grace is not None), default=None)

    def _file(self) -> str | None:
        if self._notice.file is None:
            return None
        try:
            return Path(self._notice.file).read_text(errors="replace")
        except OSError:
            return None


class Address:
    """A metadata address, asked without a proxy. An outage is logged once."""

    def __init__(self, notice: Notice) -> None:
        assert notice.url is not None
        self._url = notice.url
        self._token_url = notice.token_url
        self._token: dict[str, str] = {}
        self._client = httpx.Client(headers=notice.headers, timeout=_ANSWER, trust_env=False)
        self._unavailable = False

    def text(self) -> str | None:
        """The text at the address; None if there is none."""
        try:
            found = self._ask()
        except httpx.HTTPError as error:
            if not self._unavailable:
                logger.warning("reclaim notice address unreachable", extra={"url": self._url, "error": str(error)})
            self._unavailable = True
            return None
        self._unavailable = False
        return found.text if found.is_success else None

    def _ask(self) -> httpx.Response:
        if self._token_url is None:
            return self._client.get(self._url)
        found = self._client.get(self._url, headers=self._token)
        if found.status_code == httpx.codes.UNAUTHORIZED:
            headers = {"X-aws-ec2-metadata-token-ttl-seconds": _TOKEN_FOR}
            self._token = {"X-aws-ec2-metadata-token": self._client.put(self._token_url, headers=headers).text}
            found = self._client.get(self._url, headers=self._token)
        return found


def grace_of(text: str, notice: Notice, now: float) -> float | None:
    """Seconds until the machine is gone, from a notice's `text` at `now` (since the epoch); None if not a notice."""
    found = re.search(notice.says, text)
    if found is None:
        return None
    said = found.groupdict()
    if said.get("seconds"):
        return float(said["seconds"])
    if said.get("at"):
        with contextlib.suppress(ValueError):  # a time in another format: the notice is still valid
            return max(datetime.fromisoformat(said["at"]).timestamp() - now, 0.0)
    return notice.grace

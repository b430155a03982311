"""The address at which a cloud announces that it reclaims this machine."""

from __future__ import annotations

import logging

import httpx

from tasks.topology import Notice

logger = logging.getLogger(__name__)

_ANSWER = 2.0  # time-out in seconds of a metadata address, which is local to the machine
_TOKEN_FOR = "21600"  # seconds; AWS's maximum token lifetime


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

"""The address at which a cloud announces that it reclaims this machine."""

from __future__ import annotations

import logging
from http import HTTPStatus

from tasks.topology import Notice
from tasks.web import NO_ANSWER, WebAnswer, ask

logger = logging.getLogger(__name__)

_ANSWER_WITHIN = 2.0  # time-out in seconds of a metadata address, which is local to the machine
_TOKEN_FOR = "21600"  # seconds; AWS's maximum token lifetime


class MetadataAddress:
    """A metadata address, asked without a proxy. An outage is logged once."""

    def __init__(self, notice: Notice) -> None:
        assert notice.url is not None
        self._url = notice.url
        self._token_url = notice.token_url
        self._headers: dict[str, str] = dict(notice.headers)
        self._unavailable = False

    def text(self) -> str | None:
        """The text at the address; None if there is none."""
        try:
            found = self._ask()
        except NO_ANSWER as error:
            if not self._unavailable:
                logger.warning("reclaim notice address unreachable", extra={"url": self._url, "error": str(error)})
            self._unavailable = True
            return None
        self._unavailable = False
        return found.body.decode(errors="replace") if found.ok else None

    def _ask(self) -> WebAnswer:
        found = ask(self._url, headers=self._headers, timeout=_ANSWER_WITHIN)
        if self._token_url is not None and found.status == HTTPStatus.UNAUTHORIZED:
            headers = {**self._headers, "X-aws-ec2-metadata-token-ttl-seconds": _TOKEN_FOR}
            token = ask(self._token_url, method="PUT", headers=headers, timeout=_ANSWER_WITHIN).body.decode()
            self._headers["X-aws-ec2-metadata-token"] = token
            found = ask(self._url, headers=self._headers, timeout=_ANSWER_WITHIN)
        return found

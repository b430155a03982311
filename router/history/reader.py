"""Reads the history from the state store."""

from __future__ import annotations

from datetime import UTC, date, datetime

from router.history.columns import SETTLE, SLICE, Arrivals, assembled, hour_of
from taxiway.contract.keys import history_key
from taxiway.valkey import fleet_errors
from taxiway.valkey.connection import Connections

LAG = SLICE + 2 * SETTLE
"""Seconds in which a job that was accepted is in the history, while a router leads."""

_HOUR = 3600
_READ = 30.0  # seconds for one answer: an hour of arrivals may be many megabytes


class History:
    """The arrivals that the fleet keeps, with what became of them. Raises `BrokerUnavailableError`.

    The last `LAG` seconds are not in it yet, and count as unseen only once they are older.
    """

    def __init__(self, url: str) -> None:
        self._connections = Connections(url, answer=_READ)

    def now(self) -> float:
        """The store's time."""
        with fleet_errors("state store"):
            seconds, microseconds = self._connections.call("TIME")
        return int(seconds) + int(microseconds) / 1e6

    def read_recent(self, since: float) -> Arrivals:
        """The jobs accepted since a time by the store's clock."""
        return self._read(since, self.now() - LAG)

    def read_day(self, day: date) -> Arrivals:
        """The jobs accepted on a UTC day by the store's clock."""
        begin = datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
        return self._read(begin, min(begin + 24 * _HOUR, self.now() - LAG))

    def close(self) -> None:
        """Disconnect."""
        self._connections.close()

    def _read(self, begin: float, end: float) -> Arrivals:
        slices: dict[int, bytes] = {}
        first = int(begin // _HOUR) * _HOUR
        with fleet_errors("state store"):
            for hour in range(first, int(end) + 1, _HOUR):
                flat = self._connections.call("HGETALL", history_key(hour_of(hour)))
                slices |= {int(at): bytes(packed) for at, packed in zip(flat[::2], flat[1::2], strict=True)}
        return assembled(slices, begin, end)

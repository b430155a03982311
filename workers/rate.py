"""How fast a device runs rows."""

from __future__ import annotations

import time

_OVER = 0.25  # seconds over which the rate of rows is measured


class Rate:
    """Rows a second, lately."""

    def __init__(self) -> None:
        self.rows = 0.0
        self._since = time.monotonic()
        self._counted = 0

    def count(self, rows: int, now: float) -> None:
        """Rows ran until now."""
        self._counted += rows
        if now - self._since >= _OVER:
            self.rows = self._counted / (now - self._since)
            self._since, self._counted = now, 0

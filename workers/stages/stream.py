"""Tells answers as they are generated: appends to jobs' streams on a thread of its own, so that no device waits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace

from broker.valkey.worker_store import Store
from taxiway.contract.streaming import Piece
from taxiway.errors import BrokerUnavailableError

logger = logging.getLogger(__name__)

_PAUSE = 0.5  # seconds before a store that is away is tried again


class Streams:
    """Pieces of answers on their way to the state store. What comes while they are written goes out together."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: dict[str, Piece] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._away = False

    def put(self, pieces: Sequence[tuple[str, Piece]]) -> None:
        """Hand over jobs' next pieces. Any thread may."""
        with self._changed:
            for job, piece in pieces:
                self._add(job, piece)
            self._changed.notify()

    def stop(self) -> None:
        """End after what was handed over, or when the store does not answer. Any thread may call it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def run(self) -> None:
        """Serve until stopped."""
        while pieces := self._take():
            try:
                self._store.append(pieces)
            except BrokerUnavailableError as error:
                if self._stopping:
                    return
                if not self._away:
                    logger.warning("cannot tell answers", extra={"jobs": len(pieces), "error": error.message})
                self._away = True
                self._put_back(pieces)
            else:
                self._away = False

    def _take(self) -> dict[str, Piece]:
        """All that waits, at least one piece; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            pieces, self._waiting = self._waiting, {}
        return pieces

    def _put_back(self, pieces: dict[str, Piece]) -> None:
        """Keep what was not written, before what came since, and let the store rest."""
        with self._changed:
            since, self._waiting = self._waiting, pieces
            for job, piece in since.items():
                self._add(job, piece)
            self._changed.wait_for(lambda: self._stopping, timeout=_PAUSE)

    def _add(self, job: str, piece: Piece) -> None:
        before = self._waiting.get(job)
        if before is not None and before.attempt == piece.attempt and piece.at == before.at + len(before.text):
            piece = replace(before, text=before.text + piece.text)
        self._waiting[job] = piece

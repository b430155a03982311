"""The stream of a generated answer in the state store."""

from __future__ import annotations

from typing import Any

import redis

from broker.valkey.worker_store import WorkerStore
from tasks.queues.limits import Limits
from tasks.settings import Settings
from taxiway.contract.keys import stream_key
from taxiway.contract.stream import MOST_PIECES, Lost, Piece, Progress, read_piece


def test_a_stream_is_bounded_and_a_slow_reader_learns_what_it_lost(settings: Settings) -> None:
    store, progress = WorkerStore(settings.broker, "worker", Limits()), Progress()
    for n in range(2 * MOST_PIECES):
        store.append([("job", Piece(1, 2 * n, "ab"))])
    with redis.Redis.from_url(settings.broker) as state:
        entries: Any = state.xrange(stream_key("job"))
    pieces = [piece for _, fields in entries if isinstance(piece := read_piece(fields), Piece)]
    assert MOST_PIECES <= len(pieces) < MOST_PIECES + 200
    lost, *rest = [event for n, piece in enumerate(pieces) for event in progress.take(f"{n}-0", piece)]
    assert lost == Lost(pieces[0].at)
    assert rest == ["ab"] * len(pieces)

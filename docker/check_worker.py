"""Whether the worker in this container is alive: exits 0 while it beats in the state store, 1 when it does not.

A beat costs one small query, where `celery inspect ping` imports Celery and asks the whole fleet.
"""

import os
import socket
import sys
from typing import cast

import redis

from tasks.facts import GONE_AFTER
from tasks.settings import settings_from
from taxiway.keys import HEARTBEATS

TIMEOUT = 3.0
"""Seconds; less than the image's own time for a check."""


def silence(store: redis.Redis, host: str) -> float:
    """Seconds by the store's clock since a worker of `host` last beat; infinite if none ever did.

    Raises:
        redis.RedisError: the store does not answer.
    """
    now, micros = store.time()
    beats = cast("list[tuple[bytes, float]]", store.zrange(HEARTBEATS, 0, -1, withscores=True))
    ours = [beat for worker, beat in beats if worker.decode().endswith(f"@{host}")]
    return now + micros / 1e6 - max(ours) if ours else float("inf")


def main() -> int:
    """Check the worker of this host, which in a container is the container."""
    state = settings_from(os.environ).state
    try:
        with redis.Redis.from_url(state, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT) as store:
            quiet = silence(store, socket.gethostname())
    except redis.RedisError as error:
        sys.stderr.write(f"the state store does not answer: {error}\n")
        return 1
    sys.stderr.write(f"last heartbeat {quiet:.1f} s ago\n")
    return 0 if quiet <= GONE_AFTER else 1


if __name__ == "__main__":
    sys.exit(main())

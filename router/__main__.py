"""`python -m router`: places what producers send to the broker, without HTTP, until it is stopped.

`python -m api` does the same and serves HTTP. Reads `TAXIWAY_BROKER`, `TAXIWAY_SECRET`,
`TAXIWAY_QUEUES`, `TAXIWAY_MODELS` and the variables of `--help`; options take precedence. Prints a line on stdout when
it is ready, and logs to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial

from router.process import Signals, options, prepare, run, write_ready
from router.router import Router


async def serve(make: Callable[[], Router]) -> int:
    """Run one router until SIGTERM or SIGINT, or until a loop fails; returns the exit status."""
    router, signals = make(), Signals()
    await router.start()
    write_ready()
    status = await signals.wait(router)
    await router.stop()
    return status


def main(environment: Mapping[str, str]) -> int:
    """The command; returns 2 if a setting or queues.yaml is invalid."""
    arguments = options(environment, "python -m router").parse_args()
    return run(arguments, lambda: partial(serve, prepare(arguments, environment, Router)))


if __name__ == "__main__":
    sys.exit(main(os.environ))

"""`python -m router`: places requests until it is told to stop.

Reads `TAXIWAY_BROKER`, `TAXIWAY_STATE`, `TAXIWAY_SECRET`, `TAXIWAY_QUEUES`, `TAXIWAY_MODELS`, `TAXIWAY_HTTP_HOST`,
`TAXIWAY_HTTP_PORT` and `TAXIWAY_LOG`; options win over the last three. Says on stdout when it is ready; logs go to
stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import gc
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Mapping

import msgspec
import uvloop

from router.admission import Rules
from router.http.app import make_app
from router.http.server import HttpServer
from router.service import Router
from tasks.catalogue import load_catalogue
from tasks.document import DocumentError
from tasks.logs import log_to_stderr
from tasks.profiles import ProfileBook, load_book
from tasks.settings import Settings, SettingsError, settings_from
from tasks.topology import load_topology

logger = logging.getLogger("router")


async def serve(settings: Settings, rules: Rules, *, host: str, port: int) -> int:
    """Run one router until SIGTERM or SIGINT, or until a loop of it fails; the exit status."""
    router = Router(settings, rules, router_name())
    server = HttpServer(make_app(router), host, port)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await router.start()
    await server.start()
    sys.stdout.write(msgspec.json.encode({"ready": "router", "http": server.url}).decode() + "\n")
    sys.stdout.flush()
    stopped, failed = asyncio.create_task(stopping.wait()), asyncio.create_task(router.failed())
    await asyncio.wait([stopped, failed], return_when=asyncio.FIRST_COMPLETED)
    asked = stopped.done()
    if not asked:
        logger.critical("router failed", exc_info=failed.result())
    stopped.cancel()
    failed.cancel()
    await server.stop()
    await router.stop()
    return 0 if asked else 1


def _book(settings: Settings) -> ProfileBook:
    """The profiles as of today. A file that cannot be read costs its device a warning, not the router its start."""
    book, broken = load_book(settings.models, datetime.datetime.now(datetime.UTC).date())
    for error in broken:
        logger.warning("a profile cannot be read", extra={"error": str(error)})
    return book


def router_name() -> str:
    """A name that no other router has or had."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def main(environment: Mapping[str, str]) -> int:
    """The command; 2 where a setting, queues.yaml or a model.yaml is wrong."""
    parser = argparse.ArgumentParser(prog="python -m router", description="Places requests on the fleet's queues.")
    parser.add_argument("--host", default=environment.get("TAXIWAY_HTTP_HOST", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=environment.get("TAXIWAY_HTTP_PORT", "8080"), help="0: a free one")
    parser.add_argument("--log", default=environment.get("TAXIWAY_LOG", "INFO"), help="least level of what is logged")
    arguments = parser.parse_args()
    log_to_stderr(arguments.log.upper())
    try:
        settings = settings_from(environment)
        rules = Rules(load_topology(settings.queues), load_catalogue(settings.models), settings.secret, _book(settings))
    except (SettingsError, DocumentError) as error:
        logger.critical("cannot start", extra={"error": str(error)})
        return 2
    gc.freeze()  # modules, models and rules stay: looking them through takes 40 ms each time, in the midst of requests
    status: int = uvloop.run(serve(settings, rules, host=arguments.host, port=arguments.port))
    return status


if __name__ == "__main__":
    sys.exit(main(os.environ))

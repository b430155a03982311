"""`python -m router`: places requests until it is stopped.

Reads `TAXIWAY_BROKER`, `TAXIWAY_STATE`, `TAXIWAY_SECRET`, `TAXIWAY_QUEUES`, `TAXIWAY_MODELS` and the variables below;
options take precedence. Without keys it serves only its own machine. Prints a line on stdout when it is ready, and logs
to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop

from router.access import KeysError
from router.http.app import make_app
from router.http.gate import is_loopback
from router.http.openai.stored import StoredObjects
from router.http.server import HttpServer, open_tls
from router.keys_file import KeyFile
from router.service.admission import Rules
from router.service.arrivals import Router
from tasks.document import DocumentError
from tasks.models.folder import ModelsFolder
from tasks.queues_file import QueuesFile
from tasks.settings import Settings, SettingsError, cache_directory, settings_from
from tasks.telemetry import log_to_stderr, start_tracing
from tasks.topology import Topology

logger = logging.getLogger("router")

_COLLECT = 20_000
"""Allocations between runs of the cyclic garbage collector.

A request allocates some 300 objects, which are freed with it. With Python's default of 700 the router spent a fifth of
its time scanning the requests in progress (256 concurrent, by the HTTP door)."""


@dataclass(frozen=True, slots=True)
class Door:
    """Where HTTP is served, to whom, and whether with TLS.

    `files` is where files are kept: a folder, or an object store's address. `parting` is the number of seconds for
    which a stopping router still serves and reports not ready.
    """

    host: str
    port: int
    keys: KeyFile | None
    files: str
    tls: ssl.SSLContext | None
    parting: float


CANNOT_LISTEN = 3
"""Exit status of a router whose address is in use, or does not belong to this machine."""


async def serve(settings: Settings, rules: Rules, folder: ModelsFolder, door: Door) -> int:
    """Run one router until SIGTERM or SIGINT, or until a loop fails; returns the exit status.

    A second signal stops it at once.
    """
    router = Router(settings, rules, router_name(), folder)
    try:
        store = StoredObjects(router, settings, door.files)
        server = HttpServer(make_app(router, door.keys, store), door.host, door.port, rules.topology.limits, door.tls)
    except OSError as error:
        logger.critical("cannot listen", extra={"address": f"{door.host}:{door.port}", "error": error.strerror})
        return CANNOT_LISTEN
    stopping, at_once = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(
            number, lambda: (at_once if stopping.is_set() else stopping).set()
        )
    await router.start()
    await server.start()
    store.start()
    sys.stdout.write(msgspec.json.encode({"ready": "router", "http": server.url}).decode() + "\n")
    sys.stdout.flush()
    stopped, failed = asyncio.create_task(stopping.wait()), asyncio.create_task(router.failed())
    await asyncio.wait([stopped, failed], return_when=asyncio.FIRST_COMPLETED)
    requested = stopped.done()
    if not requested:
        logger.critical("router failed", exc_info=failed.result())
        at_once.set()
    stopped.cancel()
    failed.cancel()
    await store.stop()
    await leave(router, server, door.parting, at_once)
    return 0 if requested else 1


async def leave(router: Router, server: HttpServer, parting: float, at_once: asyncio.Event) -> None:
    """Stop without losing requests: taken arrivals are finished or returned, and load balancers have time to react."""
    server.part()
    await router.retire()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(at_once.wait(), parting)
    await server.stop(at_once, router.results.hurry)
    await router.stop()


def read_door(arguments: argparse.Namespace) -> Door:
    """The door that the options describe.

    Raises:
        KeysError, SettingsError: they are invalid, or would expose a door without keys beyond this machine.
    """
    if arguments.keys is None and not is_loopback(arguments.host):
        wanted = "127.0.0.1, or keys for remote callers (--keys FILE; `taxiway keys new` makes one)"
        raise SettingsError("--host", wanted, arguments.host)
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        raise SettingsError("--tls-cert and --tls-key", "both or neither", "one")
    try:
        tls = None if arguments.tls_cert is None else open_tls(arguments.tls_cert, arguments.tls_key)
    except OSError as error:
        wanted = "a certificate and its key in PEM"
        raise SettingsError("--tls-cert and --tls-key", wanted, error.strerror or type(error).__name__) from error
    keys = None if arguments.keys is None else KeyFile(arguments.keys)
    if tls is None and not is_loopback(arguments.host):
        logger.warning("http is not encrypted: use a TLS proxy, or --tls-cert and --tls-key")
    return Door(arguments.host, arguments.port, keys, arguments.files, tls, arguments.parting)


def read_starts(text: str, topology: Topology) -> frozenset[str]:
    """The classes named in `text`.

    Raises:
        SettingsError: one is not in queues.yaml.
    """
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    for name in names - topology.hardware.keys():
        raise SettingsError("--starts", f"classes of queues.yaml ({', '.join(sorted(topology.hardware))})", name)
    return names


def router_name() -> str:
    """A name that no other router has or had."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def options(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    """The command-line options; each has an environment variable."""

    def setting(name: str, default: str | None = None) -> str | None:
        return environment.get(f"TAXIWAY_{name}") or default

    parser = argparse.ArgumentParser(prog="python -m router", description="Places requests on the fleet's queues.")
    parser.add_argument("--host", default=setting("HTTP_HOST", "127.0.0.1"), help="where to listen [TAXIWAY_HTTP_HOST]")
    parser.add_argument(
        "--port", type=int, default=setting("HTTP_PORT", "8080"), help="0: a free one [TAXIWAY_HTTP_PORT]"
    )
    parser.add_argument("--keys", type=Path, default=setting("KEYS"), help="file of the door's keys [TAXIWAY_KEYS]")
    where = "folder or object store (s3://, gs://, az://) of files, the same for all routers [TAXIWAY_FILES]"
    parser.add_argument("--files", default=setting("FILES", str(cache_directory(environment) / "files")), help=where)
    parser.add_argument(
        "--tls-cert", type=Path, default=setting("TLS_CERT"), help="certificate, PEM [TAXIWAY_TLS_CERT]"
    )
    parser.add_argument("--tls-key", type=Path, default=setting("TLS_KEY"), help="its key, PEM [TAXIWAY_TLS_KEY]")
    parting = "seconds to keep serving after SIGTERM, not ready, for load balancers to react [TAXIWAY_PARTING]"
    parser.add_argument("--parting", type=float, default=setting("PARTING", "0"), help=parting)
    starts = "comma-separated classes whose devices an autoscaler starts on demand [TAXIWAY_STARTS]"
    parser.add_argument("--starts", default=setting("STARTS", ""), metavar="CLASS,…", help=starts)
    parser.add_argument("--log", default=setting("LOG", "INFO"), help="log level [TAXIWAY_LOG]")
    return parser


def main(environment: Mapping[str, str]) -> int:
    """The command; returns 2 if a setting or queues.yaml is invalid. An invalid model is only disabled."""
    arguments = options(environment).parse_args()
    log_to_stderr(arguments.log.upper())
    try:
        start_tracing("taxiway-router", environment)
        settings = settings_from(environment)
        folder = ModelsFolder(settings.models, QueuesFile(settings.queues))
        topology = folder.queues.topology
        folder.log_problems()
        starts = read_starts(arguments.starts, topology)
        rules = Rules(topology, folder.catalogue, settings.secret, folder.book, settings.producers, starts)
        door = read_door(arguments)
    except (SettingsError, DocumentError, KeysError) as error:
        logger.critical("cannot start", extra={"error": str(error)})
        return 2
    gc.freeze()  # modules, models and rules are permanent: scanning them takes 40 ms, during which requests wait
    gc.set_threshold(_COLLECT)
    status: int = uvloop.run(serve(settings, rules, folder, door))
    return status


if __name__ == "__main__":
    sys.exit(main(os.environ))

"""`python -m api`: a router with its HTTP API, until it is stopped.

Reads `TAXIWAY_BROKER`, `TAXIWAY_SECRET`, `TAXIWAY_QUEUES`, `TAXIWAY_MODELS` and the variables of
`--help`; options take precedence. Without keys it serves only its own machine. Prints a line on stdout when it is
ready, and logs to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import ssl
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from api.access import KeysError
from api.app import make_app
from api.keys_file import KeyFile
from api.objects.stored import StoredObjects
from api.peers.serving import PeerServing
from api.routing.router import HttpRouter
from api.server import HttpServer, digest_of, open_tls
from router.process import Signals, options, prepare, run, setting, write_ready
from tasks.settings import SettingsError, cache_directory
from taxiway.client.http_link import is_loopback
from taxiway.contract.peers import WaitingLine
from taxiway.running import end

logger = logging.getLogger("router")


@dataclass(frozen=True, slots=True)
class Listening:
    """Where HTTP is served, to whom, and whether with TLS.

    `files` is where files are kept: a folder, or an object store's address. `reached` as in `WaitingLines`. `parting`
    is the number of seconds for which a stopping router still serves and reports not ready.
    """

    host: str
    port: int
    keys: KeyFile | None
    files: str
    tls: ssl.SSLContext | None
    reached: WaitingLine
    parting: float


CANNOT_LISTEN = 3
"""Exit status of a router whose address is in use, or does not belong to this machine."""


async def serve(make: Callable[[], HttpRouter], listening: Listening, environment: Mapping[str, str]) -> int:
    """Run one router until SIGTERM or SIGINT, or until a loop fails; returns the exit status."""
    router = make()
    try:
        store = StoredObjects(router, listening.files)
        app = make_app(router, listening.keys, store, listening.reached)
        server = HttpServer(app, listening.host, listening.port, router.rules.topology.limits, listening.tls)
    except OSError as error:
        address = f"{listening.host}:{listening.port}"
        logger.critical("cannot listen", extra={"address": address, "error": error.strerror})
        return CANNOT_LISTEN
    signals = Signals()
    await router.start()
    await server.start()
    store.start()
    serving = asyncio.create_task(PeerServing(app.desk, environment).run(), name="peers")
    write_ready(http=server.url)
    status = await signals.wait(router)
    await end([serving])
    await store.stop()
    await leave(router, server, listening.parting, signals.at_once)
    return status


async def leave(router: HttpRouter, server: HttpServer, parting: float, at_once: asyncio.Event) -> None:
    """Stop without losing requests: taken arrivals are finished or returned, and load balancers have time to react."""
    server.part()
    await router.retire()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(at_once.wait(), parting)
    await server.stop(at_once, router.results.hurried.set)
    await router.stop()


def read_listening(arguments: argparse.Namespace) -> Listening:
    """Where and to whom the options say that HTTP is served.

    Raises:
        KeysError, SettingsError: they are invalid, or would serve callers without keys beyond this machine.
    """
    if arguments.keys is None and not is_loopback(arguments.host):
        wanted = "127.0.0.1, or keys for remote callers (--keys FILE; `taxiway keys new` makes one)"
        raise SettingsError("--host", wanted, arguments.host)
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        raise SettingsError("--tls-cert and --tls-key", "both or neither", "one")
    try:
        tls = None if arguments.tls_cert is None else open_tls(arguments.tls_cert, arguments.tls_key)
        certificate = "" if arguments.tls_cert is None or arguments.url else digest_of(arguments.tls_cert)
    except (OSError, ValueError) as error:
        wanted = "a certificate and its key in PEM"
        raise SettingsError(
            "--tls-cert and --tls-key", wanted, getattr(error, "strerror", None) or type(error).__name__
        ) from error
    keys = None if arguments.keys is None else KeyFile(arguments.keys)
    if tls is None and not is_loopback(arguments.host):
        logger.warning("http is not encrypted: use a TLS proxy, or --tls-cert and --tls-key")
    reached = WaitingLine(arguments.url, "", certificate)
    return Listening(arguments.host, arguments.port, keys, arguments.files, tls, reached, arguments.parting)


def http_options(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    """The options of a router with HTTP; each has an environment variable."""
    of, parser = partial(setting, environment), options(environment, "python -m api")
    parser.add_argument("--host", default=of("HTTP_HOST", "127.0.0.1"), help="where to listen [TAXIWAY_HTTP_HOST]")
    parser.add_argument("--port", type=int, default=of("HTTP_PORT", "8080"), help="0: a free one [TAXIWAY_HTTP_PORT]")
    parser.add_argument("--keys", type=Path, default=of("KEYS"), help="file of the API's keys [TAXIWAY_KEYS]")
    where = "folder or object store (s3://, gs://, az://) of files, the same for all routers [TAXIWAY_FILES]"
    parser.add_argument("--files", default=of("FILES", str(cache_directory(environment) / "files")), help=where)
    parser.add_argument("--tls-cert", type=Path, default=of("TLS_CERT"), help="certificate, PEM [TAXIWAY_TLS_CERT]")
    parser.add_argument("--tls-key", type=Path, default=of("TLS_KEY"), help="its key, PEM [TAXIWAY_TLS_KEY]")
    url = "where workers reach this router, for peers that wait for work; else where these do [TAXIWAY_HTTP_URL]"
    parser.add_argument("--url", default=of("HTTP_URL", ""), help=url)
    parting = "seconds to keep serving after SIGTERM, not ready, for load balancers to react [TAXIWAY_PARTING]"
    parser.add_argument("--parting", type=float, default=of("PARTING", "0"), help=parting)
    return parser


def main(environment: Mapping[str, str]) -> int:
    """The command; returns 2 if a setting, the keys or queues.yaml is invalid."""
    arguments = http_options(environment).parse_args()

    def make() -> Callable[[], Awaitable[int]]:
        return partial(serve, prepare(arguments, environment, HttpRouter), read_listening(arguments), environment)

    return run(arguments, make, KeysError)


if __name__ == "__main__":
    sys.exit(main(os.environ))

"""A router's process: its options, its settings, and when it stops. `python -m api` has them too."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TypeVar

import msgspec
import uvloop

from router.router import Router
from router.service.admission import Rules
from router.service.classifier import load_classifier
from tasks.document import DocumentError
from tasks.models.folder import ModelsFolder
from tasks.queues.endpoints import HOME
from tasks.queues.queues_file import QueuesFile
from tasks.queues.receipts import Sign
from tasks.queues.sealing import open_seal_keys
from tasks.settings import SettingsError, settings_from
from tasks.telemetry import log_to_stderr, start_tracing
from tasks.topology import Topology

logger = logging.getLogger("router")

_COLLECT = 20_000
"""Allocations between runs of the cyclic garbage collector.

A request allocates some 300 objects, which are freed with it. With Python's default of 700 the router spent a fifth of
its time scanning the requests in progress (256 concurrent, by HTTP)."""

AnyRouter = TypeVar("AnyRouter", bound=Router)


class Signals:
    """SIGTERM and SIGINT: the first stops the router, a second one stops it `at_once`."""

    def __init__(self) -> None:
        self.at_once = asyncio.Event()
        self._stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._received)

    async def wait(self, router: Router) -> int:
        """Wait for a signal, or until one of the router's loops fails; returns the exit status."""
        stopped, failed = asyncio.create_task(self._stopping.wait()), asyncio.create_task(router.failed())
        await asyncio.wait([stopped, failed], return_when=asyncio.FIRST_COMPLETED)
        requested = stopped.done()
        if not requested:
            logger.critical("router failed", exc_info=failed.result())
            self.at_once.set()
        stopped.cancel()
        failed.cancel()
        return 0 if requested else 1

    def _received(self) -> None:
        (self.at_once if self._stopping.is_set() else self._stopping).set()


def write_ready(**facts: str) -> None:
    """Print the line on stdout that says that the router is ready."""
    sys.stdout.write(msgspec.json.encode({"ready": "router", **facts}).decode() + "\n")
    sys.stdout.flush()


def setting(environment: Mapping[str, str], name: str, default: str | None = None) -> str | None:
    """The environment variable of an option, or else its default."""
    return environment.get(f"TAXIWAY_{name}") or default


def options(environment: Mapping[str, str], program: str) -> argparse.ArgumentParser:
    """The options of every router; each has an environment variable."""
    parser = argparse.ArgumentParser(prog=program, description="Places requests on the fleet's queues.")
    amqp = "a RabbitMQ whose producers the fleet serves too, amqp://… [TAXIWAY_AMQP]"
    parser.add_argument("--amqp", default=setting(environment, "AMQP", ""), metavar="URL", help=amqp)
    starts = "comma-separated classes whose devices an autoscaler starts on demand [TAXIWAY_STARTS]"
    parser.add_argument("--starts", default=setting(environment, "STARTS", ""), metavar="CLASS,…", help=starts)
    site_key = "file of the Ed25519 key that signs the receipts of labelled work [TAXIWAY_SITE_KEY]"
    parser.add_argument("--site-key", default=setting(environment, "SITE_KEY", ""), metavar="FILE", help=site_key)
    parser.add_argument("--log", default=setting(environment, "LOG", "INFO"), help="log level [TAXIWAY_LOG]")
    return parser


def prepare(
    arguments: argparse.Namespace, environment: Mapping[str, str], kind: type[AnyRouter]
) -> Callable[[], AnyRouter]:
    """Makes a router as the options and the environment say, not started. An invalid model is only disabled.

    Raises:
        SettingsError, DocumentError: a setting or queues.yaml is invalid.
    """
    start_tracing("taxiway-router", environment)
    settings = settings_from(environment)
    folder = ModelsFolder(settings.models, QueuesFile(settings.queues))
    topology = folder.queues.topology
    folder.log_problems()
    if (amqp := arguments.amqp) and not amqp.startswith(("amqp://", "amqps://")):
        shown = amqp.partition("://")[0] + "://…"
        raise SettingsError("--amqp", "an address that starts with amqp:// or amqps://", shown)
    starts = read_starts(arguments.starts, topology)
    classify = load_classifier(topology.locality.classifier)
    rules = Rules(
        topology,
        folder.catalogue,
        settings.secret,
        folder.book,
        settings.producers,
        starts,
        classify=classify,
        seal_keys=open_seal_keys(settings.seals, topology),
        sign=read_site_key(arguments.site_key, topology),
    )
    name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"  # that no other has or had
    return partial(kind, settings, rules, name, folder, amqp)


def read_site_key(path: str, topology: Topology) -> Sign | None:
    """What signs receipts, with the key in a file; None if no file is named, which is logged if classes have labels.

    Raises:
        SettingsError: the file has no key.
    """
    if path:
        from tasks.site_key import load_site_key, public_text  # others start 60 ms sooner without cryptography

        key = load_site_key(path)
        logger.info("receipts are signed", extra={"public_key": public_text(key)})
        return key.sign
    if any(set(hardware.labels) - {HOME} for hardware in topology.hardware.values()):
        logger.warning("receipts of labelled work are not signed: TAXIWAY_SITE_KEY names no key")
    return None


def read_starts(text: str, topology: Topology) -> frozenset[str]:
    """The classes named in `text`.

    Raises:
        SettingsError: one is not in queues.yaml.
    """
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    for name in names - topology.hardware.keys():
        raise SettingsError("--starts", f"classes of queues.yaml ({', '.join(sorted(topology.hardware))})", name)
    return names


def run(
    arguments: argparse.Namespace,
    make: Callable[[], Callable[[], Awaitable[int]]],
    invalid: type[Exception] = SettingsError,
) -> int:
    """Run what `make` returns; 2 after a wrong setting or file, or an `invalid` error, with the reason in the log."""
    log_to_stderr(arguments.log.upper())
    try:
        serve = make()
    except (SettingsError, DocumentError, invalid) as error:
        logger.critical("cannot start", extra={"error": str(error)})
        return 2
    gc.freeze()  # modules, models and rules are permanent: scanning them takes 40 ms, during which requests wait
    gc.set_threshold(_COLLECT)
    status: int = uvloop.run(serve())
    return status

"""Starts a fleet for each folder of a site, and runs what is said to the lines between them until it is stopped.

In a site's queues.yaml, the name of another stands for its address, `http://cloud`: here it becomes the near end of a
line. Each fleet is a `taxiway up` of its own, with its data in a folder of its own, and ends with this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from urllib.parse import urlsplit

import msgspec
from click import echo

from local.children import ends_within, start_child
from local.fleet import LocalFleet, supervising
from local.plan import absent
from local.sites.line import ScriptedLine
from local.sites.script import Command, ScriptError, parse_command, parse_script
from local.supervisor import ended_with, in_tree, own_command
from tasks.check import QUEUES
from tasks.machine import Machine
from tasks.topology import Topology, parse_topology
from taxiway.cli import USAGE, CommandError, report

STOP_TIMEOUT = 120.0
"""Seconds within which a fleet ends when asked."""

_OWN = ("TAXIWAY_BROKER", "TAXIWAY_AMQP", "TAXIWAY_SECRET", "TAXIWAY_SITE_KEY", "TAXIWAY_DATA")
"""Variables that fleets of one machine must not share."""

_TAIL = 2000  # characters of a log in an error


@dataclass(frozen=True, slots=True)
class SitePlan:
    """A site's queues.yaml, and the sites that it names there."""

    text: str
    peers: tuple[str, ...]

    def with_lines(self, ends: Mapping[str, str]) -> str:
        """The file with the near end of a line, by the name of its far end, in place of each name."""
        return _named(self.peers).sub(lambda found: ends[found[1]], self.text)


def plan_sites(folders: Sequence[Path]) -> dict[str, SitePlan]:
    """The sites of these folders, or of their folders, by name.

    Raises:
        CommandError: a folder is no site.
        TopologyError: a queues.yaml is invalid.
    """
    files = [file for folder in folders for file in _files(folder)]
    texts = {file.parent.resolve().name: file.read_text() for file in files}
    for text in texts.values():
        parse_topology(text)
    peers = {name: sorted({found[1] for found in _named(texts).finditer(text)}) for name, text in texts.items()}
    return {name: SitePlan(text, tuple(peers[name])) for name, text in texts.items()}


def _files(folder: Path) -> list[Path]:
    own = folder / QUEUES
    files = [own] if own.exists() else sorted(folder.glob(f"*/{QUEUES}"))
    if not files:
        raise CommandError(f"--sites: expected a folder with a {QUEUES}, or of such, got {folder}", hint="", code=USAGE)
    return files


def _named(sites: Collection[str]) -> re.Pattern[str]:
    """Where a URL has the name of one of these sites for its host."""
    return re.compile(rf"http://({'|'.join(map(re.escape, sorted(sites))) or '(?!)'})(?![\w.:-])")


def options_of(
    topology: Topology, machine: Machine, emulate: Sequence[str], counts: Mapping[str, int], *, fetching: bool
) -> list[str]:
    """How a site's fleet is started: one worker for each class, and emulated ones for the devices that are absent."""
    wanted = set(emulate) & set(topology.hardware) if emulate else absent(topology, machine)
    workers = {name: counts.get(name, 1) for name, one in topology.hardware.items() if one.endpoint is None}
    options = [] if fetching else ["--no-fetch"]
    options += [word for name in sorted(wanted) for word in ("--emulate", name)]
    return options + [word for name, count in workers.items() for word in ("--workers", f"{name}={count}")]


class Sites:
    """The fleets and lines of one machine. `plans` are by site; `options` are those of `taxiway up` for a fleet."""

    def __init__(self, plans: Mapping[str, SitePlan], data: Path, options: Callable[[Topology], list[str]]) -> None:
        self._plans, self._data, self._options = plans, data, options
        self._lines = [ScriptedLine(near, far) for near, plan in plans.items() for far in plan.peers]
        self._running: list[Popen[bytes]] = []
        self._stopped = asyncio.Event()

    async def run(self, script: Sequence[tuple[float, Command]], announce: Callable[[Mapping[str, str]], None]) -> None:
        """Start all, call `announce` with the URL of each, and keep them running until SIGTERM or SIGINT.

        Raises:
            AlreadyRunningError: fleets run from the same data directory.
            CommandError: a fleet cannot be started; nothing is left running.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop)
        with supervising(self._data):
            try:
                urls = await self._start()
                if not self._stopped.is_set():
                    announce(urls)
                    self._follow(script, loop)
                    await self._stopped.wait()
            finally:
                if not self._stopped.is_set():
                    self._stop()
                for process in self._running:
                    await asyncio.to_thread(ends_within, process, STOP_TIMEOUT)

    def _stop(self) -> None:
        """Ask all fleets to end; the second time, at once."""
        self._stopped.set()
        for process in self._running:
            process.terminate()

    async def _start(self) -> dict[str, str]:
        """Start the fleets, first those that hand nothing on; returns their URLs, unless stopped meanwhile."""
        ends = {line: await line.open() for line in self._lines}
        urls: dict[str, str] = {}
        if self._stopped.is_set():
            return {}
        for site, plan in sorted(self._plans.items(), key=lambda one: (len(one[1].peers), one[0])):
            echo(f"starting {site}", err=True)
            text = plan.with_lines({line.far: end for line, end in ends.items() if line.near == site})
            process = self._started(site, text)
            assert process.stdout is not None
            ready = await asyncio.to_thread(process.stdout.readline)
            if self._stopped.is_set():
                return {}
            if not ready:
                said = self._log(site).read_text(errors="replace")[-_TAIL:]
                raise ended_with(f"site {site}: {said}", await asyncio.to_thread(process.wait))
            urls[site] = msgspec.json.decode(ready, type=LocalFleet).http
            there = urlsplit(urls[site])
            for line in self._lines:
                if line.far == site and there.hostname and there.port:
                    line.there = there.hostname, there.port
        return urls

    def _started(self, site: str, text: str) -> Popen[bytes]:
        data = self._data / site
        (data / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
        queues = data / QUEUES
        queues.write_text(text)
        kept = {name: value for name, value in os.environ.items() if name not in _OWN}
        options = ["--no-flower", "--json", "--data", str(data), *self._options(parse_topology(text))]
        with self._log(site).open("wb") as log:
            process = start_child(
                own_command("up", *options),
                on_death=signal.SIGTERM,
                environment=in_tree({**kept, "TAXIWAY_QUEUES": str(queues)}),
                output=PIPE,
                errors=log.fileno(),
            )
        self._running.append(process)
        return process

    def _log(self, site: str) -> Path:
        return self._data / site / "logs" / "supervisor.log"

    def _follow(self, script: Sequence[tuple[float, Command]], loop: asyncio.AbstractEventLoop) -> None:
        for at, command in script:
            loop.call_later(at, command.apply, self._lines)
        with contextlib.suppress(PermissionError):  # nothing can be typed where it is a file
            loop.add_reader(sys.stdin, self._obey, loop)

    def _obey(self, loop: asyncio.AbstractEventLoop) -> None:
        """Do what was typed."""
        text = sys.stdin.readline()
        if not text:
            loop.remove_reader(sys.stdin)
        elif text.strip():
            try:
                parse_command(text, self._plans).apply(self._lines)
            except ScriptError as error:
                report(str(error), "")


def run_sites(
    folders: Sequence[Path],
    script: Path | None,
    data: Path,
    options: Callable[[Topology], list[str]],
    announce: Callable[[Mapping[str, str]], None],
) -> None:
    """Run the sites of these folders until SIGTERM or SIGINT. Raises what `plan_sites` and `Sites.run` raise."""
    plans = plan_sites(folders)
    try:
        commands = parse_script(script.read_text(), plans) if script is not None else []
    except ScriptError as error:
        raise CommandError(f"{script}: {error}", hint="", code=USAGE) from error
    asyncio.run(Sites(plans, data, options).run(commands, announce))

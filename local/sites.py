"""Starts a fleet for each folder of a site, and runs what is said to the lines between them until it is stopped.

In a site's queues.yaml, the name of another stands for its address, `http://cloud`: here it becomes the near end of a
line. Each fleet is a `taxiway up` of its own, with its data in a folder of its own, and ends with this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from urllib.parse import urlsplit

import msgspec
from click import echo

from local.children import ends_within, start_child, tail
from local.fleet import LocalFleet, supervising
from local.plan import absent
from local.supervisor import ended_with, in_tree, own_command
from tasks.check import QUEUES
from tasks.machine import Machine
from tasks.topology import Topology, parse_topology, read_topology
from taxiway.cli import USAGE, CommandError, report

_CHUNK = 2**16


class ScriptedLine:
    """A line between two sites: it carries connections late and at a bounded rate, and can be cut.

    Site `near` opens them to site `far`, whose address `there` is known once it is up.

    `delay` is in seconds each way, `rate` in bytes a second each way.
    """

    def __init__(self, near: str, far: str) -> None:
        self.near, self.far = near, far
        self.there: tuple[str, int] | None = None
        self.delay, self.rate = 0.0, math.inf
        self._cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._free = [0.0, 0.0]  # when each direction has sent what it has

    async def open(self) -> str:
        """Listen; returns the URL of its near end."""
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Abort all connections, and let none through."""
        self._cut = True
        for writer in list(self._writers):
            writer.transport.abort()

    def restore(self) -> None:
        """Let connections through."""
        self._cut = False

    async def _carry(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        if self._cut or self.there is None:
            near_out.transport.abort()
            return
        try:
            far_in, far_out = await asyncio.open_connection(*self.there)
        except OSError:
            near_out.transport.abort()
            return
        both = {near_out, far_out}
        self._writers |= both
        with contextlib.suppress(OSError, asyncio.CancelledError):  # at the loop's end; Python 3.11 would log it
            await asyncio.gather(self._pump(near_in, far_out, 0), self._pump(far_in, near_out, 1))
        self._writers -= both
        for writer in both:
            writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: int) -> None:
        """Each chunk waits for its turn, then for the delay, however many are on their way."""
        loop = asyncio.get_running_loop()
        while chunk := await source.read(_CHUNK):
            free = self._free[way] = max(loop.time(), self._free[way]) + len(chunk) / self.rate
            loop.call_at(free + self.delay, _write, sink, chunk)
            await asyncio.sleep(max(free - loop.time(), 0.0))
        loop.call_later(self.delay, sink.close)


def _write(sink: asyncio.StreamWriter, chunk: bytes) -> None:
    if not sink.is_closing():
        sink.write(chunk)


class ScriptError(ValueError):
    """A command of no form that lines know; the message says what was expected."""


@dataclass(frozen=True, slots=True)
class Command:
    """What is done to the lines of `sites`: every line of one, or the line between two."""

    verb: str
    sites: frozenset[str]
    figure: float = math.nan
    """Of `delay` and `rate`."""

    def apply(self, lines: Iterable[ScriptedLine]) -> None:
        """Do it."""
        for line in lines:
            if self.sites <= {line.near, line.far}:
                match self.verb:
                    case "cut":
                        line.cut()
                    case "restore":
                        line.restore()
                    case "delay":
                        line.delay = self.figure
                    case "rate":
                        line.rate = self.figure


def parse_command(text: str, sites: Collection[str]) -> Command:
    """The command in a text, such as `cut cloud`, `restore edge cloud`, `delay cloud 0.04` or `rate cloud 10000000`.

    Delays are in seconds, and rates in bytes a second, each way.

    Raises:
        ScriptError: it has another form, or names no site.
    """
    verb, *words = text.split() or [""]
    figure = _figure(words.pop()) if verb in ("delay", "rate") and words else math.nan
    known = verb in ("cut", "restore") or (verb == "delay" and figure >= 0) or (verb == "rate" and figure > 0)
    if not known or len(words) not in (1, 2):
        forms = "cut SITE, restore SITE, delay SITE SECONDS or rate SITE BYTES_PER_SECOND"
        raise ScriptError(f"expected {forms}, got {text.strip()!r}")
    if unknown := set(words) - set(sites):
        raise ScriptError(f"expected a site ({', '.join(sorted(sites))}), got {min(unknown)!r}")
    return Command(verb, frozenset(words), figure)


def parse_script(text: str, sites: Collection[str]) -> list[tuple[float, Command]]:
    """The commands of a script with the seconds since the start at which they are due, in that order.

    Raises:
        ScriptError: a line is no number and command.
    """
    commands = []
    for number, line in enumerate(text.splitlines(), 1):
        if words := line.partition("#")[0].strip():
            at, _, command = words.partition(" ")
            if not _figure(at) >= 0:
                raise ScriptError(f"line {number}: expected seconds and a command, got {words!r}")
            try:
                commands.append((float(at), parse_command(command, sites)))
            except ScriptError as error:
                raise ScriptError(f"line {number}: {error}") from error
    return sorted(commands, key=lambda one: one[0])


def _figure(text: str) -> float:
    """A number; else NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan


STOP_TIMEOUT = 120.0
"""Seconds within which a fleet ends when asked."""

_OWN = ("TAXIWAY_BROKER", "TAXIWAY_AMQP", "TAXIWAY_SECRET", "TAXIWAY_SITE_KEY", "TAXIWAY_DATA")
"""Variables that fleets of one machine must not share."""


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
    texts = {file.parent.resolve().name: read_topology(file)[1] for file in files}
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
                raise ended_with(f"site {site}: {tail(self._log(site))}", await asyncio.to_thread(process.wait))
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
        queues.write_text(text, encoding="utf-8")
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

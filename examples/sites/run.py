"""Three fleets on one machine, and lines between them that can be slow and cut.

    python examples/sites/run.py            # Ctrl-C stops all of it
    cut cloud                               # typed while it runs: no line to the cloud
    restore cloud

Each folder beside this file is a site. In their files the name of a site stands for the address of its line, which this
program fills in. The sites that others hand work to start first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
SITES = ("cloud", "lab", "edge")
DELAYS = {"cloud": 0.04, "lab": 0.005}
"""Seconds that the line to a site takes, each way."""

BYTES_PER_SECOND = 10_000_000
"""What each line carries."""

_CHUNK = 2**16


@dataclass(eq=False)
class Line:
    """Carries connections to an address; `port` is its near end."""

    host: str
    port_there: int
    delay: float
    port: int = 0
    cut: bool = False
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def sever(self) -> None:
        """Cut all connections, and let none through."""
        self.cut = True
        for writer in list(self._writers):
            writer.transport.abort()

    async def _carry(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        if self.cut:
            near_out.transport.abort()
            return
        try:
            far_in, far_out = await asyncio.open_connection(self.host, self.port_there)
        except OSError:
            near_out.transport.abort()
            return
        both = {near_out, far_out}
        self._writers |= both
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pump(near_in, far_out), self._pump(far_in, near_out))
        self._writers -= both
        for writer in both:
            writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Every byte waits for the delay, however many are on their way, and for its turn."""
        loop, free = asyncio.get_running_loop(), 0.0
        while chunk := await source.read(_CHUNK):
            free = max(loop.time(), free) + len(chunk) / BYTES_PER_SECOND
            loop.call_at(free + self.delay, _write, sink, chunk)
            await asyncio.sleep(max(free - loop.time(), 0.0))
        loop.call_later(self.delay, sink.close)


def _write(sink: asyncio.StreamWriter, chunk: bytes) -> None:
    if not sink.is_closing():
        sink.write(chunk)


def start(site: str, folder: Path, ports: Mapping[str, int]) -> Any:
    """Start a site's fleet, whose peers are at the ends of lines; returns its addresses."""
    text = (HERE / site / "queues.yaml").read_text()
    for name, port in ports.items():
        text = text.replace(f'"http://{name}"', f'"http://127.0.0.1:{port}"')
    data = folder / site
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    queues = data / "queues.yaml"
    queues.write_text(text)
    more = ["--emulate", "gpu.realtime"] if site == "cloud" else ["--workers", "cpu.batch=1"]
    command = ["up", "--detach", "--json", "--no-flower", "--data", str(data), *more]
    return json.loads(taxiway(command, queues))


def taxiway(arguments: list[str], queues: Path) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "local", *arguments]
    variables = {**os.environ, "TAXIWAY_QUEUES": str(queues), "PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True).stdout


async def run(folder: Path) -> None:
    """Run until interrupted."""
    lines: dict[str, Line] = {}
    started: list[str] = []
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    try:
        addresses = {}
        for site in SITES:
            started.append(site)
            ports = {name: line.port for name, line in lines.items()}
            fleet = await asyncio.to_thread(start, site, folder, ports)
            addresses[site] = fleet["http"]
            there = urlsplit(fleet["http"])
            if site in DELAYS and there.hostname and there.port:
                lines[site] = Line(there.hostname, there.port, DELAYS[site])
                await lines[site].open()
        sys.stdout.write(json.dumps(addresses) + "\n")
        sys.stdout.flush()
        with contextlib.suppress(PermissionError):  # nothing can be typed where it is a file
            loop.add_reader(sys.stdin, obey, lines, loop)
        await stopped.wait()
    finally:
        for site in reversed(started):
            with contextlib.suppress(subprocess.CalledProcessError):
                taxiway(["down", "--data", str(folder / site)], folder / site / "queues.yaml")


def obey(lines: Mapping[str, Line], loop: asyncio.AbstractEventLoop) -> None:
    """Do what was typed."""
    text = sys.stdin.readline()
    if not text:
        loop.remove_reader(sys.stdin)
    match text.split():
        case ["cut", name] if name in lines:
            lines[name].sever()
        case ["restore", name] if name in lines:
            lines[name].cut = False
        case [*words] if words:
            sys.stderr.write(f"expected cut or restore, and one of {', '.join(lines)}\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".taxiway-sites"), help="where the fleets keep their data")
    asyncio.run(run(parser.parse_args().data.absolute()))


if __name__ == "__main__":
    main()

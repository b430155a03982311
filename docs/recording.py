"""Writes docs/recording.svg: a terminal in which a real fleet starts, answers and explains (`make recording`).

The commands run in a pseudo-terminal, and each change of the screen is a frame. The SVG is a strip of frames that CSS
moves past the window, so it plays where scripts do not run; it follows the reader's colour scheme, and shows the last
frame to readers who want no motion.
"""

from __future__ import annotations

import asyncio
import fcntl
import io
import math
import os
import pty
import re
import select
import shutil
import struct
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from itertools import groupby, pairwise
from pathlib import Path

import pyte
from rich.console import Console

from examples.demo import answer_all, asks
from local.fleet import read_fleet, stop_fleet
from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.settings import TREE, cache_directory, models_folder

COLUMNS, ROWS = 100, 32
CELL, LINE = 8.4, 18  # pixels of a character of 14 px, and of a row
FRAME = 0.15  # seconds within which changes are one frame

STYLE = """
svg { --fg: #1f2328; --bg: #f6f8fa; --red: #cf222e; --green: #116329; --brown: #9a6700; --blue: #0969da;
  --magenta: #8250df; --cyan: #1b7c83; }
@media (prefers-color-scheme: dark) { svg { --fg: #e6edf3; --bg: #0d1117; --red: #ff7b72; --green: #7ee787;
  --brown: #e3b341; --blue: #79c0ff; --magenta: #d2a8ff; --cyan: #76e3ea; } }
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: var(--fg);
  white-space: pre; }
"""


class Recorder:
    """A terminal whose screens are kept in `frames`, each with the seconds that it is shown."""

    def __init__(self) -> None:
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)
        self.frames: list[tuple[tuple[str, ...], float]] = []

    def show(self, output: bytes, seconds: float) -> None:
        """Write to the screen, and show it for so long."""
        self._stream.feed(output)
        self.frames.append((tuple(row(self._screen, y) for y in range(ROWS)), seconds))

    def run(self, command: str, *, at_most: float, read: float = 0, stop: float = math.inf) -> str:
        """Type a command, run it and return what it wrote.

        A run that takes longer is shown in `at_most` seconds, its last screen for `read` seconds more. After `stop`
        seconds it gets Ctrl-C.
        """
        self.show(b"\x1b[1;32m$\x1b[0m ", 0.4)
        for word in re.findall(r"\S+\s*", command):
            self.show(word.encode(), 0.12)
        self.show(b"\r\n", 0)
        screens = [(b"", 0.0), *_outputs(command, stop)]
        spans = [after - before for (_, before), (_, after) in pairwise(screens)]
        pace = min(1.0, at_most / sum(spans))
        for (output, _), span in zip(screens, [*spans, read / pace], strict=True):
            self.show(output, span * pace)
        return b"".join(output for output, _ in screens).decode()

    def clear(self) -> None:
        """Begin an empty screen."""
        self._stream.feed(b"\x1b[2J\x1b[H")


def _outputs(command: str, stop: float) -> Iterator[tuple[bytes, float]]:
    """What a command writes, in pieces of at most a frame's time, each with the seconds since the start."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp("bash", ["bash", "-c", f"exec {command}"])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    begun, written = time.monotonic(), b""
    while output := _piece(terminal):
        written += output
        yield output, time.monotonic() - begun
        if time.monotonic() - begun > stop:
            os.write(terminal, b"\x03")
            stop = math.inf
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError(f"{command}: exit code {code}\n{written.decode()}")


def _piece(terminal: int) -> bytes:
    output, end = b"", time.monotonic() + FRAME
    while not output or select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0]:
        try:
            output += os.read(terminal, 1 << 16)
        except OSError:  # Linux says so when the program has ended
            break
    return output


def row(screen: pyte.Screen, y: int) -> str:
    """The SVG of a row: one text for each run of a colour and weight, as wide as its cells in any font."""
    pieces, at = [], 0
    for (colour, bold), run in groupby((screen.buffer[y][x] for x in range(COLUMNS)), lambda one: (one.fg, one.bold)):
        text = "".join(one.data for one in run)
        if shown := text.strip():
            x = (at + len(text) - len(text.lstrip())) * CELL
            look = "" if colour == "default" else f"fill:var(--{colour.removeprefix('bright')});"
            style = f' style="{look}{"font-weight:bold" * bold}"' if look or bold else ""
            pieces.append(f'<text x="{x:.1f}" textLength="{len(shown) * CELL:.1f}"{style}>{escape(shown)}</text>')
        at += len(text)
    return "".join(pieces)


def svg(frames: list[tuple[tuple[str, ...], float]]) -> str:
    """The animation; a row that frames share is written once."""
    names: dict[str, str] = {}
    strip, moves, total, now = [], [], sum(seconds for _, seconds in frames), 0.0
    width, height = COLUMNS * CELL + 24, ROWS * LINE + 20
    for place, (rows, alike) in enumerate(groupby(frames, lambda frame: frame[0])):
        moves.append(f"{100 * now / total:.2f}% {{ transform: translateY({-place * height}px); }}")
        now += sum(seconds for _, seconds in alike)
        used = [(names.setdefault(one, f"r{len(names)}"), y * LINE) for y, one in enumerate(rows) if one]
        uses = "".join(f'<use href="#{name}" y="{y}"/>' for name, y in used)
        strip.append(f'<g transform="translate(12 {place * height + 24})">{uses}</g>')
    shared = "".join(f'<g id="{name}">{text}</g>' for text, name in names.items())
    play = f"@keyframes play {{ {' '.join(moves)} }} #strip {{ animation: play {total:.1f}s step-end infinite; }}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}">'
        f"<style>{STYLE}#strip {{ transform: translateY({(1 - len(moves)) * height}px); }}\n"
        f"@media (prefers-reduced-motion: no-preference) {{ {play} }}</style><defs>{shared}</defs>"
        f'<rect width="100%" height="100%" rx="8" style="fill:var(--bg)"/><g id="strip">{"".join(strip)}</g></svg>\n'
    )


@contextmanager
def loaded(url: str) -> Iterator[None]:
    """Submits the quick inputs of the demo again and again, so that the fleet has work to show."""
    catalogue, stop = load_catalogue(models_folder(os.environ)), threading.Event()
    inputs = asks(catalogue, cache_directory(os.environ), skipped=("chat", "generate", "ising"))

    def submit() -> None:
        while not stop.is_set():
            asyncio.run(answer_all(url, inputs, Console(file=io.StringIO())))

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def record(recorder: Recorder, data: Path) -> None:
    """What the recording shows."""
    recorder.run("taxiway up --detach --emulate gpu.realtime", at_most=2, read=2)
    recorder.clear()
    recorder.run('taxiway submit sentiment "The crew was kind and the landing smooth."', at_most=0.8, read=1.2)
    recorder.run('taxiway submit generate "Begin a fairy tale." --stream --service interactive', at_most=2, read=0.6)
    said = recorder.run("taxiway submit classify-image --file photo.jpg --service live", at_most=0.8, read=2.5)
    recorder.clear()
    recorder.run(f"taxiway explain {re.findall(r'job ([0-9a-f-]{36})', said)[0]}", at_most=0.8, read=4.5)
    recorder.clear()
    fleet = read_fleet(data)
    assert fleet is not None
    with loaded(fleet.http):
        recorder.run("taxiway top", at_most=6, stop=6)
    recorder.clear()
    recorder.run("taxiway down", at_most=0.8, read=1)


def main() -> None:
    """Record a fleet of its own, in a folder of its own."""
    catalogue, store = load_catalogue(models_folder(os.environ)), ArtefactStore(cache_directory(os.environ))
    recorder, bin_ = Recorder(), Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        photo = store.path(catalogue.resolve("classify-image"), "photo-bullmastiff")
        shutil.copy(photo, Path(folder, "photo.jpg"))
        os.environ |= {"TAXIWAY_DATA": folder, "TERM": "xterm-256color", "PATH": f"{bin_}:{os.environ['PATH']}"}
        os.chdir(folder)
        try:
            record(recorder, Path(folder))
        finally:
            stop_fleet(Path(folder))
    text = svg(recorder.frames)
    (TREE / "docs" / "recording.svg").write_text(text, encoding="utf-8")
    sys.stdout.write(f"docs/recording.svg: {len(text.encode()) / 1000:.0f} kB\n")


if __name__ == "__main__":
    main()

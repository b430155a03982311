"""What is done to the lines between sites: typed while they run, or in a script with the second of each command.

    cut cloud               restore cloud
    delay cloud 0.04        seconds, each way
    rate cloud 10000000     bytes a second, each way

A site's name stands for every line that it has, two names for the line between them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from local.sites.line import ScriptedLine


class ScriptError(ValueError):
    """A command of no form that lines know; the message says what was expected."""


@dataclass(frozen=True, slots=True)
class Command:
    """What is done to the lines of `sites`."""

    verb: str
    sites: frozenset[str]
    figure: float = math.nan
    """Of `delay` and `rate`."""

    def apply(self, lines: Iterable[ScriptedLine]) -> None:
        """Do it."""
        for line in lines:
            if self.sites <= line.sites:
                self._apply(line)

    def _apply(self, line: ScriptedLine) -> None:
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
    """The command in a text.

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

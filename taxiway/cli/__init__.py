"""The command line: one module per group of verbs, imported on use. Data goes to stdout, everything else to stderr.

Here is the root command, and how a command fails: its exit code, an `error:` line and a `hint:` line. Its table names
every verb, so that help needs no verb's module.
"""

from __future__ import annotations

import importlib
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click
from click.shell_completion import get_completion_class

from taxiway.errors import (
    BrokerFullError,
    BrokerUnavailableError,
    ModelUnavailableError,
    NoDeviceError,
    OverloadedError,
    ResultTimeoutError,
    TaxiwayError,
    UnauthenticatedError,
    UnknownJobError,
    UnknownLetterError,
    UnknownModelError,
    UnplaceableError,
    quoted,
)

OK, JOB_FAILED, USAGE, MISSING, UNAVAILABLE, INTERRUPTED, UNREAD = 0, 1, 2, 3, 4, 130, 141

EXIT_CODES = {
    OK: "done",
    JOB_FAILED: "the job failed, was cancelled or missed its deadline",
    USAGE: "usage error, or a request that can never succeed",
    MISSING: "something is missing on this machine",
    UNAVAILABLE: "no fleet, or it cannot answer now or in time",
    INTERRUPTED: "interrupted",
    UNREAD: "the reader of the output ended first",
}
"""The meaning of each exit code."""

_HINTS: dict[type[TaxiwayError], str] = {
    UnauthenticatedError: "set TAXIWAY_KEY to the API key from the fleet's operator",
    UnknownJobError: "`taxiway jobs` lists the latest jobs",
    UnknownLetterError: "`taxiway dead list` lists them",
    UnknownModelError: "`taxiway models` lists what the fleet can run",
    UnplaceableError: "`taxiway status` shows the fleet's classes and devices",
    BrokerFullError: "free memory or disk space of the state store, as the error says",
    BrokerUnavailableError: "`taxiway doctor` shows what runs here; `taxiway up` starts a fleet, --url names another",
    ModelUnavailableError: "`taxiway check` shows the errors",
    NoDeviceError: "`taxiway status` lists the live devices; start a worker for the class",
    OverloadedError: "allow a longer --deadline, or add workers",
    ResultTimeoutError: "the job continues; `taxiway result ID --wait SECONDS` waits for it again",
}

_FULL = {
    "memory": "give the state store more maxmemory, or lower keep_result and keep_record in queues.yaml",
    "disk": "free space on the disk of the state store; what they accepted is kept",
}
"""What to do about a `BrokerFullError`, by its `details["resource"]`."""


class CommandError(Exception):
    """A command failed for a reason outside the fleet."""

    def __init__(self, message: str, *, hint: str, code: int) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code


def hint_for(error: TaxiwayError) -> str:
    """What to do about the error; empty if unknown."""
    hint = next((text for kind, text in _HINTS.items() if isinstance(error, kind)), "")
    if isinstance(error, BrokerFullError):
        hint = _FULL.get(error.details.get("resource", ""), hint)
    if isinstance(error, OverloadedError) and error.details.keys() - {"retry_after"}:  # by a limit of a tenant or class
        hint = "wait, or have the limit raised in queues.yaml"
    if error.retry_after is not None:
        again = f"try again in {span(error.retry_after)}"
        return f"{hint} ({again})" if hint else again
    return hint


def span(seconds: float) -> str:
    """A duration in six characters; empty if there is none."""
    if seconds < 0.0005:
        return ""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def report(message: str, hint: str) -> None:
    """Print `error: …` to stderr, and `hint: …` if there is one."""
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(message, err=True)
    if hint:
        click.secho("hint: ", fg="cyan", bold=True, nl=False, err=True)
        click.echo(hint, err=True)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn errors into an `error:` line, a `hint:` line and an exit code."""
    try:
        yield
    except TaxiwayError as error:
        report(error.message, hint_for(error))
        sys.exit(error.exit_code)
    except CommandError as error:
        report(str(error), error.hint)
        sys.exit(error.code)
    except UnicodeEncodeError as error:  # Python reads arguments' other bytes as surrogates
        report(f"expected arguments in UTF-8, got {quoted(error.object)}", "")
        sys.exit(USAGE)


@contextmanager
def exit_with_reader() -> Iterator[None]:
    """Exit with `UNREAD`, quietly, where the program that reads stdout has ended: `taxiway status | head -1`.

    What stdout's encoding lacks is printed as an escape: a check mark in a locale of Latin-1.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except SystemExit as end:
        if not _unread(end):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more
        sys.exit(UNREAD)


def _unread(end: SystemExit) -> bool:
    """Whether output was lost because nothing reads stdout: click and rich make that an exit with 1."""
    with suppress(AttributeError, ValueError, OSError):  # stdout is closed, or not a file
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            return True
        if end.code == JOB_FAILED:
            poller = select.poll()
            poller.register(sys.stdout.fileno(), 0)
            return isinstance(end.__context__, BrokenPipeError) or bool(poller.poll(0))
    return False


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.option("--json", "as_json", is_flag=True, help="Print the script as JSON.")
@click.pass_context
def completion(ctx: click.Context, *, shell: str, as_json: bool) -> None:
    """Print SHELL's completion script. To use it now: `eval "$(taxiway completion bash)"`."""
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ctx.find_root().command, {}, "taxiway", "_TAXIWAY_COMPLETE").source()
    if as_json:
        from taxiway.cli.address import print_json

        print_json({"shell": shell, "script": script})
        return
    click.echo(script)


COMMANDS = {
    "up": ("local up", "Start a complete fleet on this machine."),
    "down": ("local down", "Stop the fleet on this machine."),
    "join": ("local join", "Serve a class of a fleet elsewhere from this machine."),
    "doctor": ("local doctor", "Report what this machine has, what is missing, and how to install it."),
    "submit": ("taxiway.cli.jobs", "Send a request to a model and print its answer."),
    "array": ("taxiway.cli.jobs", "Send each line of a file to a model, as one array."),
    "result": ("taxiway.cli.jobs", "Print a job's answer."),
    "status": ("taxiway.cli.jobs", "Show a job or the fleet."),
    "jobs": ("taxiway.cli.jobs", "List jobs by state, model and tenant."),
    "top": ("taxiway.cli.show", "Show the whole fleet, live."),
    "explain": ("taxiway.cli.jobs", "Show why a job runs where it does."),
    "audit": ("router.audit", "Show where labelled work was placed, export it, or verify an export."),
    "cancel": ("taxiway.cli.jobs", "Cancel a job before it is answered."),
    "dead": ("taxiway.cli.jobs", "Inspect, replay or drop dead letters."),
    "models": ("taxiway.cli.jobs", "List what the fleet can run."),
    "check": ("workers.check", "Check queues.yaml and the models."),
    "drain": ("taxiway.cli.jobs", "Hand the fleet's work to other fleets."),
    "keys": ("api.keys_file", "Create, list and revoke API keys of the HTTP API."),
    "profile": ("workers.profiling", "Measure how models run on this machine."),
    "simulate": ("simulator simulate", "Replay a trace on a modelled fleet."),
    "history": ("simulator.own_fleet.history", "Show what arrived and what became of it, or export it as a trace."),
    "diff-config": ("simulator diff-config", "Show what a history would have cost under another configuration."),
    "plan": ("simulator plan", "Find the cheapest instances that serve a load in time."),
    "completion": ("taxiway.cli", "Print a shell's completion script."),
}
"""For each verb, the module with the command of the same name, or what runs it of the fleet, and its help text."""


class Root(click.Group):
    """Imports a verb's module on use, and turns errors into messages and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, in order of typical use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command; None for an unknown verb."""
        if cmd_name not in COMMANDS:
            return None
        home, _ = COMMANDS[cmd_name]
        if home.startswith("taxiway."):
            command: click.Command = getattr(importlib.import_module(home), cmd_name)
            return command
        from taxiway.cli.fleet import FleetVerb

        return FleetVerb(cmd_name, home)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of verbs."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, what) for name, (_, what) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of exit codes."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line."""
        with exit_with_reader():
            return super().main(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            with exit_on_error():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            report("interrupted", "")
            ctx.exit(INTERRUPTED)


CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""How every verb's command line shows its help."""


@click.group(cls=Root, context_settings=CONTEXT)
@click.version_option(package_name="taxiway", message="taxiway %(version)s", help="Print the version.")
def main() -> None:
    """Air traffic control for AI inference.

    One fleet of heterogeneous hardware; each request runs on the cheapest device that meets its deadline.
    """

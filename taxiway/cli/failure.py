"""How a command fails: its exit code, an `error:` line and a `hint:` line."""

from __future__ import annotations

import click

from taxiway.errors import (
    BrokerFullError,
    BrokerUnavailableError,
    ModelUnavailableError,
    NoDeviceError,
    OverloadedError,
    ResultTimeoutError,
    TaxiwayError,
    UnauthenticatedError,
    UnknownModelError,
    UnplaceableError,
)

OK, JOB_FAILED, USAGE, MISSING, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 4, 130

EXIT_CODES = {
    OK: "done",
    JOB_FAILED: "the job failed, was cancelled or missed its deadline",
    USAGE: "usage error, or a request that can never succeed",
    MISSING: "something is missing on this machine",
    UNAVAILABLE: "no fleet, or it cannot answer now or in time",
    INTERRUPTED: "interrupted",
}
"""The meaning of each exit code."""

_HINTS: dict[type[TaxiwayError], str] = {
    UnauthenticatedError: "set TAXIWAY_KEY to the API key from the fleet's operator",
    UnknownModelError: "`taxiway models` lists what the fleet can run",
    UnplaceableError: "`taxiway status` shows the fleet's classes and devices",
    BrokerFullError: "give the broker more maxmemory, or lower keep_result and keep_record in queues.yaml",
    BrokerUnavailableError: "start a fleet with `taxiway up --detach`, or name one with --url or TAXIWAY_URL",
    ModelUnavailableError: "`taxiway check` says what to repair; a running fleet detects the repair by itself",
    NoDeviceError: "`taxiway status` lists the live devices; start a worker for the class",
    OverloadedError: "try again later, or allow a longer --deadline",
    ResultTimeoutError: "the job continues; `taxiway result ID --wait SECONDS` waits for it again",
}


class CommandError(Exception):
    """A command failed for a reason outside the fleet."""

    def __init__(self, message: str, *, hint: str, code: int) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code


def exit_code(error: TaxiwayError) -> int:
    """The exit code for an error of the fleet."""
    return error.exit_code


def hint_for(error: TaxiwayError) -> str:
    """What to do about the error; empty if unknown."""
    hint = next((text for kind, text in _HINTS.items() if isinstance(error, kind)), "")
    if error.retry_after is not None:
        return f"{hint or 'try again'} (in {error.retry_after:g} s)"
    return hint


def report(message: str, hint: str) -> None:
    """Print `error: …` to stderr, and `hint: …` if there is one."""
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(message, err=True)
    if hint:
        click.secho("hint: ", fg="cyan", bold=True, nl=False, err=True)
        click.echo(hint, err=True)

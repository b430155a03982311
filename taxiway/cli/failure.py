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
    USAGE: "wrong usage, or a request that can never succeed",
    MISSING: "something is missing on this machine",
    UNAVAILABLE: "no fleet, or it cannot answer now or in time",
    INTERRUPTED: "interrupted",
}
"""What each exit code says."""

_HINTS: dict[type[TaxiwayError], str] = {
    UnauthenticatedError: "TAXIWAY_KEY holds the key that the fleet's operator gave you",
    UnknownModelError: "`taxiway models` lists what the fleet can run",
    UnplaceableError: "`taxiway status` shows the fleet's classes and devices",
    BrokerFullError: "give the broker more maxmemory, or lower keep_result and keep_record in queues.yaml",
    BrokerUnavailableError: "`taxiway up --detach` starts a fleet here; --url or TAXIWAY_URL names another",
    ModelUnavailableError: "`taxiway check` says what to repair; a running fleet notices the repair by itself",
    NoDeviceError: "`taxiway status` shows which devices are there; start a worker for the class",
    OverloadedError: "try again later, or allow a longer --deadline",
    ResultTimeoutError: "the job goes on; `taxiway result ID --wait SECONDS` asks again",
}


class CommandError(Exception):
    """A command cannot go on, for a reason outside the fleet."""

    def __init__(self, message: str, *, hint: str, code: int) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code


def exit_code(error: TaxiwayError) -> int:
    """The exit code for an error of the fleet."""
    return error.exit_code


def hint_for(error: TaxiwayError) -> str:
    """What to do about it, or nothing."""
    hint = next((text for kind, text in _HINTS.items() if isinstance(error, kind)), "")
    if error.retry_after is not None:
        return f"{hint or 'try again'} (in {error.retry_after:g} s)"
    return hint


def report(message: str, hint: str) -> None:
    """Print `error: …`, and `hint: …` where there is one, to stderr."""
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(message, err=True)
    if hint:
        click.secho("hint: ", fg="cyan", bold=True, nl=False, err=True)
        click.echo(hint, err=True)

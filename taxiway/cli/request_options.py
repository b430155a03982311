"""The options that describe a request: its inputs, the model's parameters, and the service terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import msgspec

from taxiway.contract.request import Priority

F = TypeVar("F", bound=Callable[..., Any])


def _parameter(_: click.Context, __: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Any]:
    """Parse `name=value` pairs; a value is JSON if it parses as JSON, else text."""
    parameters: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"expected name=value, got {pair!r}")
        parameters[name] = json_or_text(text.encode())
    return parameters


_OPTIONS = (
    click.option("--text", "texts", multiple=True, help="A text; repeat it for a batch."),
    click.option(
        "--file",
        "files",
        multiple=True,
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A file, sent as raw bytes (an image, for example); repeat it for a batch.",
    ),
    click.option(
        "--inputs", "as_text", metavar="JSON", help="Inputs as JSON: a value, a mapping by name, or OIP tensors."
    ),
    click.option("-p", "--parameter", "parameters", metavar="NAME=VALUE", multiple=True, callback=_parameter),
    click.option("--deadline", type=float, metavar="SECONDS", help="Maximum time from acceptance to answer."),
    click.option("--service", help="A service level of queues.yaml: live, standard, bulk, …"),
    click.option("--priority", type=click.Choice(get_args(Priority))),
    click.option("--budget", type=float, metavar="USD", help="Maximum cost of the answer."),
    click.option("--tenant", help="The tenant that the request belongs to."),
    click.option("--locality", help="A label that every device on the request's path must carry."),
    click.option("--min-accuracy", type=float, metavar="SHARE", help="Minimum stated accuracy of the variant, 0 to 1."),
    click.option("--idempotency-key", help="Requests with the same tenant and key are one job."),
)


def request_options(command: F) -> F:
    """Adds `texts`, `files` and `as_text` (see `inputs_of`), `parameters`, and each service term by its name."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def inputs_of(*, texts: Sequence[str], files: Sequence[Path], as_text: str | None) -> Any:
    """The request's inputs, of one kind.

    Raises:
        click.UsageError: there is no input, or more than one kind.
    """
    if sum((bool(texts), bool(files), as_text is not None)) != 1:
        raise click.UsageError("expected exactly one kind of input: --text, --file, --inputs or -")
    if as_text is not None:
        try:
            return msgspec.json.decode(as_text)
        except msgspec.DecodeError as error:
            raise click.BadParameter(f"expected JSON: {error}", param_hint="--inputs") from error
    rows: list[str | bytes] = [*texts] if texts else [file.read_bytes() for file in files]
    return rows[0] if len(rows) == 1 else rows


def json_or_text(raw: bytes) -> Any:
    """The JSON value in `raw`, else its text, else the bytes."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw

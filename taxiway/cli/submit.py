"""`submit`: a request from the terminal, and the options that describe one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import msgspec

from taxiway.cli import UNAVAILABLE, CommandError
from taxiway.cli.address import ask, fleet_options, print_json
from taxiway.client.asyncio_client import AsyncClient, AsyncJob
from taxiway.contract.job import Event, Lost, Restarted, Result
from taxiway.contract.request import Priority
from taxiway.contract.values import to_wire
from taxiway.errors import ResultTimeoutError

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


async def tell(job: AsyncJob, timeout: float | None, *, as_json: bool) -> Result:
    """Print the events of the job's answer (`as_json`: one JSON line each); returns the result, unprinted."""
    async with aclosing(job.stream(timeout)) as told:
        event = await anext(told)
        while not isinstance(event, Result):
            _print_json(event) if as_json else _print(event)
            event = await anext(told)
    if not as_json:
        click.echo()
    return event


def _print(event: Event) -> None:
    match event:
        case Restarted(attempt):
            click.secho(f"\nthe worker was lost; the answer restarts (attempt {attempt})", err=True, dim=True)
        case Lost(characters):
            click.secho(f"\n{characters} characters were missed; the result contains them", err=True, dim=True)
        case text:
            click.echo(text, nl=False)


def _print_json(event: Event) -> None:
    match event:
        case Restarted(attempt):
            print_json({"restarted": attempt})
        case Lost(characters):
            print_json({"lost": characters})
        case text:
            print_json({"text": text})


EXAMPLES = """\b
Examples:
  taxiway submit sentiment --text "What a flight!" --deadline 1
  taxiway submit classify-image --file photo.jpg
  taxiway submit generate --text "Once upon a time" -p max_tokens=40 --service bulk --no-wait
  taxiway submit generate --text "Begin a fairy tale." --stream
"""


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.argument("stdin", metavar="[-]", required=False, type=click.Choice(["-"]))
@request_options
@click.option("--wait/--no-wait", default=True, help="Wait for the answer (default), or print the job's id.")
@click.option("--stream", is_flag=True, help="Print a generated answer as it is produced; JSON lines with --json.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Wait at most this long; the job continues.")
@fleet_options
def submit(
    model: str,
    *,
    stdin: str | None,
    texts: tuple[str, ...],
    files: tuple[Path, ...],
    as_text: str | None,
    parameters: dict[str, Any],
    wait: bool,
    stream: bool,
    timeout: float | None,
    url: str | None,
    data: Path | None,
    as_json: bool,
    **terms: Any,
) -> None:
    """Send a request to MODEL and print its answer.

    The inputs are --text, --file, --inputs or - (standard input: JSON if it reads as JSON, else text, else bytes).
    --json sets the output format of the answer.
    """
    inputs = _inputs(stdin, texts, files, as_text)

    async def send(client: AsyncClient) -> tuple[str, Result | None]:
        job = await client.submit(model, inputs, parameters=parameters or None, stream=stream or None, **terms)
        return job.id, await _answer(job, timeout, stream=stream, as_json=as_json) if wait else None

    job, result = ask(url, data, send)
    if result is None:
        print_json({"id": job}) if as_json else click.echo(job)
    elif stream and not as_json:
        click.secho(_how(result), err=True, dim=True)
    else:
        print_result(job, result, as_json=as_json)


def print_result(job: str, result: Result, *, as_json: bool) -> None:
    """Print an answer, as JSON or for people."""
    if as_json:
        print_json({"id": job, "model": result.model, "outputs": to_wire(result.outputs), "report": result.report})
        return
    from taxiway.cli.show import show_result

    show_result(result)


def _how(result: Result) -> str:
    from taxiway.cli.show import report_line

    return f"{result.model}  {report_line(result.report)}"


async def _answer(job: AsyncJob, timeout: float | None, *, stream: bool, as_json: bool) -> Result:
    if not as_json:
        click.secho(f"job {job.id}", err=True, dim=True)
    try:
        return await (tell(job, timeout, as_json=as_json) if stream else job.result(timeout))
    except ResultTimeoutError as error:
        hint = f"`taxiway result {job.id} --wait SECONDS` waits for it again"
        raise CommandError(error.message, hint=hint, code=UNAVAILABLE) from error


def _inputs(stdin: str | None, texts: tuple[str, ...], files: tuple[Path, ...], as_text: str | None) -> Any:
    if stdin is None:
        return inputs_of(texts=texts, files=files, as_text=as_text)
    if texts or files or as_text is not None:
        raise click.UsageError("expected exactly one kind of input: --text, --file, --inputs or -")
    return json_or_text(sys.stdin.buffer.read())

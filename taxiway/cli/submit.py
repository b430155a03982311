"""`submit`: a request from the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from taxiway.cli.address import ask, fleet_options, print_json
from taxiway.cli.failure import UNAVAILABLE, CommandError
from taxiway.client.asyncio_client import AsyncClient, AsyncJob
from taxiway.errors import ResultTimeoutError
from taxiway.job import Result
from taxiway.request import Priority
from taxiway.values import to_wire

EXAMPLES = """\b
Examples:
  taxiway submit sentiment --text "What a flight!" --deadline 1
  taxiway submit classify-image --file photo.jpg
  taxiway submit generate --text "Once upon a time" -p max_tokens=40 --service bulk --no-wait
"""


def _parameter(_: click.Context, __: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Any]:
    """`name=value` pairs; a value that is JSON is read as JSON, any other is text."""
    parameters: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"expected name=value, got {pair!r}")
        parameters[name] = json_or_text(text.encode())
    return parameters


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.argument("stdin", metavar="[-]", required=False, type=click.Choice(["-"]))
@click.option("--text", "texts", multiple=True, help="A text; more than one make a batch.")
@click.option(
    "--file",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file, sent as it is (a photograph, say); more than one make a batch.",
)
@click.option("--inputs", "as_text", metavar="JSON", help="Inputs as JSON: a value, a mapping by name, or OIP tensors.")
@click.option("-p", "--parameter", "parameters", metavar="NAME=VALUE", multiple=True, callback=_parameter)
@click.option("--deadline", type=float, metavar="SECONDS", help="From acceptance to the answer.")
@click.option("--service", help="A service level of queues.yaml: live, standard, bulk, …")
@click.option("--priority", type=click.Choice(get_args(Priority)))
@click.option("--budget", type=float, metavar="USD", help="The most that the answer may cost.")
@click.option("--tenant", help="For whom the request is.")
@click.option("--locality", help="A label that every device on the way must carry.")
@click.option(
    "--min-accuracy", type=float, metavar="SHARE", help="The least accuracy of the variant that answers, 0 to 1."
)
@click.option("--idempotency-key", help="The same tenant and key are the same job.")
@click.option("--wait/--no-wait", default=True, help="Wait for the answer (default), or print the job's id.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Wait at most so long; the job goes on.")
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
    timeout: float | None,
    url: str | None,
    data: Path | None,
    as_json: bool,
    **terms: Any,
) -> None:
    """Send a request to MODEL and print its answer.

    The inputs are --text, --file, --inputs or - (standard input: JSON if it reads as JSON, else text, else bytes).
    --json is the form of the answer.
    """
    inputs = _inputs(stdin, texts, files, as_text)

    async def send(client: AsyncClient) -> tuple[str, Result | None]:
        job = await client.submit(model, inputs, parameters=parameters or None, **terms)
        return job.id, await _answer(job, timeout, quiet=as_json) if wait else None

    job, result = ask(url, data, send)
    if result is None:
        print_json({"id": job}) if as_json else click.echo(job)
    else:
        print_result(job, result, as_json=as_json)


def print_result(job: str, result: Result, *, as_json: bool) -> None:
    """Print an answer, for a program or for people."""
    if as_json:
        print_json({"id": job, "model": result.model, "outputs": to_wire(result.outputs), "report": result.report})
        return
    from taxiway.cli.show import show_result

    show_result(result)


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


async def _answer(job: AsyncJob, timeout: float | None, *, quiet: bool) -> Result:
    if not quiet:
        click.secho(f"job {job.id}", err=True, dim=True)
    try:
        return await job.result(timeout)
    except ResultTimeoutError as error:
        hint = f"`taxiway result {job.id} --wait SECONDS` asks again"
        raise CommandError(error.message, hint=hint, code=UNAVAILABLE) from error


def _inputs(stdin: str | None, texts: tuple[str, ...], files: tuple[Path, ...], as_text: str | None) -> Any:
    given = [bool(stdin), bool(texts), bool(files), as_text is not None]
    if sum(given) != 1:
        raise click.UsageError("expected exactly one kind of input: --text, --file, --inputs or -")
    if stdin:
        return json_or_text(sys.stdin.buffer.read())
    if as_text is not None:
        try:
            return msgspec.json.decode(as_text)
        except msgspec.DecodeError as error:
            raise click.BadParameter(f"expected JSON: {error}", param_hint="--inputs") from error
    rows: list[str | bytes] = [*texts] if texts else [file.read_bytes() for file in files]
    return rows[0] if len(rows) == 1 else rows

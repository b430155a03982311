"""`submit`: a request from the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from taxiway.cli.address import ask, fleet_options, print_json
from taxiway.cli.failure import UNAVAILABLE, CommandError
from taxiway.cli.request_options import inputs_of, json_or_text, request_options
from taxiway.cli.streaming_output import tell
from taxiway.client.asyncio_client import AsyncClient, AsyncJob
from taxiway.contract.job import Result
from taxiway.contract.values import to_wire
from taxiway.errors import ResultTimeoutError

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

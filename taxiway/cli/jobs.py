"""Verbs that ask a running fleet: `submit`, `array`, its jobs, its dead letters, and the models that it can run."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, get_args

import click
import msgspec

from taxiway.cli import JOB_FAILED, UNAVAILABLE, USAGE, CommandError, hint_for, report
from taxiway.cli.address import AskedFleet, fleet_options, print_json, processes_here
from taxiway.client.arrays import WITHIN
from taxiway.client.asyncio_client import AsyncClient, AsyncJob
from taxiway.contract.job import FINAL, JobRecord, JobState, JobStatus, Result, RunProgress
from taxiway.contract.request import Priority
from taxiway.contract.stream import Event, Lost, Restarted
from taxiway.contract.values import to_wire
from taxiway.errors import (
    BrokerUnavailableError,
    FleetUnavailable,
    RequestError,
    ResultTimeoutError,
    TaxiwayError,
    UnknownModelError,
)
from taxiway.listing import LISTED_JOBS, JobPage

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


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
    click.option(
        *("-p", "--parameter", "parameters"),
        metavar="NAME=VALUE",
        multiple=True,
        callback=_parameter,
        help="A parameter of the model, as `taxiway models` and GET /v2/models/MODEL list them; repeat it for several.",
    ),
    click.option("--deadline", type=float, metavar="SECONDS", help="Maximum time from acceptance to answer."),
    click.option("--service", help="A service level of queues.yaml: live, standard, bulk, …"),
    click.option("--priority", type=click.Choice(get_args(Priority))),
    click.option("--budget", type=float, metavar="USD", help="Maximum cost of the answer."),
    click.option("--tenant", help="The tenant that the request belongs to."),
    click.option("--locality", help="A label that every device on the request's path must carry."),
    click.option("--min-accuracy", type=float, metavar="SHARE", help="Minimum stated accuracy of the variant, 0 to 1."),
    click.option(
        "--webhook", metavar="ENDPOINT", help="A webhook endpoint to notify when the job ends: name, id or address."
    ),
    click.option("--idempotency-key", help="Requests with the same tenant and key are one job."),
)


def request_options(command: F) -> F:
    """Adds `texts`, `files` and `as_text` (see `inputs_of`), `parameters`, and each service term by its name."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def inputs_of(*, texts: Sequence[str], files: Sequence[Path], as_text: str | None, piped: bool = False) -> Any:
    """The request's inputs, of one kind; those `piped` are on standard input.

    Raises:
        click.UsageError: there is no input, or more than one kind.
    """
    if sum((bool(texts), bool(files), as_text is not None, piped)) != 1:
        raise click.UsageError("expected exactly one kind of input: a text, --file, --inputs or -")
    if piped:
        return json_or_text(sys.stdin.buffer.read())
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


async def followed(job: AsyncJob, timeout: float | None, show: Callable[[Event], object]) -> Result:
    """A job's result; the events before it are shown."""
    async with aclosing(job.stream(timeout)) as events:
        event = await anext(events)
        while not isinstance(event, Result):
            show(event)
            event = await anext(events)
        return event


async def watch(job: AsyncJob, timeout: float | None) -> Result:
    """A job's result; meanwhile a bar shows what its callable reports."""
    from taxiway.cli.show import progress_bar

    with progress_bar() as show:
        return await followed(job, timeout, show)


def _print(event: Event) -> None:
    match event:
        case Restarted(attempt):
            click.secho(f"\nthe worker was lost; the answer restarts (attempt {attempt})", err=True, dim=True)
        case Lost(characters):
            click.secho(f"\n{characters} characters were missed; the result contains them", err=True, dim=True)
        case RunProgress():
            click.secho(event.text, err=True, dim=True)
        case text:
            click.echo(text, nl=False)


def _print_json(event: Event) -> None:
    match event:
        case Restarted(attempt):
            print_json({"restarted": attempt})
        case Lost(characters):
            print_json({"lost": characters})
        case RunProgress():
            print_json({"progress": event})
        case text:
            print_json({"text": text})


EXAMPLES = """\b
Examples:
  taxiway submit sentiment "What a flight!" --deadline 1
  taxiway submit classify-image --file photo.jpg
  taxiway submit generate --text "Once upon a time" -p max_tokens=40 --service bulk --no-wait
  taxiway submit generate --text "Begin a fairy tale." --stream
"""


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.argument("text", metavar="[TEXT|-]", required=False)
@request_options
@click.option("--wait/--no-wait", default=True, help="Wait for the answer (default), or print the job's id.")
@click.option("--stream", is_flag=True, help="Print a generated answer as it is produced; JSON lines with --json.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Wait at most this long; the job continues.")
@fleet_options
def submit(
    model: str,
    *,
    text: str | None,
    texts: tuple[str, ...],
    files: tuple[Path, ...],
    as_text: str | None,
    parameters: dict[str, Any],
    wait: bool,
    stream: bool,
    timeout: float | None,
    fleet: AskedFleet,
    **terms: Any,
) -> None:
    """Send a request to MODEL and print its answer.

    The inputs are TEXT, --text, --file, --inputs or - (standard input: JSON if it reads so, else text, else bytes).
    --json sets the output format of the answer.
    """
    given = texts if text in (None, "-") else (text, *texts)
    inputs = inputs_of(texts=given, files=files, as_text=as_text, piped=text == "-")

    async def send(client: AsyncClient) -> tuple[str, Result | None]:
        job = await client.submit(model, inputs, parameters=parameters or None, stream=stream or None, **terms)
        return job.id, await answer_of(job, timeout, stream=stream, as_json=fleet.as_json) if wait else None

    job, result = fleet.ask(send)
    if result is None:
        fleet.echo({"id": job}, job)
    elif stream and not fleet.as_json:
        from taxiway.cli.show import report_line

        click.secho(f"{result.model}  {report_line(result.report)}", err=True, dim=True)
    else:
        print_result(job, result, as_json=fleet.as_json)


def print_result(job: str, result: Result, *, as_json: bool) -> None:
    """Print an answer, as JSON or for people."""
    if as_json:
        print_json({"id": job, "model": result.model, "outputs": to_wire(result.outputs), "report": result.report})
        return
    from taxiway.cli.show import show_result

    show_result(result)


async def answer_of(job: AsyncJob, timeout: float | None, *, stream: bool, as_json: bool) -> Result:
    """A job's answer, printed as it comes with `stream`. If the fleet stops answering, the job continues.

    Raises:
        CommandError: there is no answer in time; the hint is how to wait for it again.
    """
    if not as_json:
        click.secho(f"job {job.id}", err=True, dim=True)
    try:
        if stream:
            result = await followed(job, timeout, _print_json if as_json else _print)
            if not as_json:
                click.echo()
            return result
        return await (job.result(timeout) if as_json or not sys.stderr.isatty() else watch(job, timeout))
    except (ResultTimeoutError, BrokerUnavailableError) as error:
        hint = f"`taxiway result {job.id} --wait SECONDS` waits for the job, which continues"
        raise CommandError(error.message, hint=hint, code=UNAVAILABLE) from error


_ARRAY_EXAMPLES = """\b
Examples:
  taxiway array sentiment reviews.txt > answers.jsonl
  taxiway array ising sweep.jsonl --within 1h --no-wait
"""


@click.command(epilog=_ARRAY_EXAMPLES)
@click.argument("model")
@click.argument("lines", metavar="FILE|-", type=click.File("rb"))
@click.option("--within", default=WITHIN, metavar="TIME", show_default=True, help="Time for all of it: 30m, 24h, 7d.")
@click.option("--tenant", help="The tenant that the requests belong to.")
@click.option("--locality", help="A label that every device on the requests' path must carry.")
@click.option("--budget", type=float, metavar="USD", help="Maximum cost of each answer.")
@click.option("--wait/--no-wait", default=True, help="Wait for the answers (default), or print the array's id.")
@fleet_options
def array(model: str, *, lines: BinaryIO, within: str, wait: bool, fleet: AskedFleet, **terms: Any) -> None:
    """Send each line of FILE to MODEL as one array, and print a line of JSON for each answer, in order, as they come.

    A line is the input as JSON if it reads so, else as text. The array goes on if this command ends; a router keeps it.
    """
    inputs = [json_or_text(line) for line in lines.read().splitlines() if line.strip()]

    async def send(client: AsyncClient) -> tuple[str, int]:
        made, failed = await client.array(model, inputs, within=within, **terms), 0
        if not wait:
            return made.id, 0
        from taxiway.cli.show import array_bar

        with array_bar() as watch:
            async for outcome in made.outcomes(watch=watch):
                failed += isinstance(outcome, TaxiwayError)
                print_json(_outcome(outcome))
        return made.id, failed

    name, failed = fleet.ask(send)
    if not wait:
        fleet.echo({"id": name}, name)
    if failed:
        sys.exit(JOB_FAILED)


def _outcome(outcome: Result | TaxiwayError) -> dict[str, Any]:
    if isinstance(outcome, TaxiwayError):
        return {"error": outcome.message, "code": outcome.code}
    return {"outputs": to_wire(outcome.outputs), "report": outcome.report}


_USUAL = 20  # jobs listed by default

_JOBS_EXAMPLES = """\b
Examples:
  taxiway jobs --state failed --state dead
  taxiway jobs --model sentiment --tenant lab --limit 100 --json
"""

_EXPLAIN_EXAMPLES = """\b
Examples:
  taxiway explain 1c0f8a3e-6d5b-4a52-8a3c-0f6f8f8d8a11
  taxiway explain --what-if generate --text "Once upon a time" -p max_tokens=200 --deadline 2
"""


@click.command()
@click.argument("job", metavar="ID")
@click.option("--wait", type=float, default=0.0, metavar="SECONDS", help="Wait up to this long for the job to end.")
@fleet_options
def result(job: str, *, wait: float, fleet: AskedFleet) -> None:
    """Print the answer of job ID."""
    print_result(job, fleet.ask(lambda client: client.job(job).result(wait)), as_json=fleet.as_json)


@click.command()
@click.argument("job", metavar="[ID]", required=False)
@fleet_options
def status(job: str | None, *, fleet: AskedFleet) -> None:
    """Show the state of job ID. Without an ID, show the fleet: classes, devices, warm variants and queue depths."""
    if job is None:
        fleet.present(_overview(fleet), "show_fleet")
    else:
        fleet.present(fleet.ask(lambda client: client.job(job).status()), "show_status")


@click.command(epilog=_JOBS_EXAMPLES)
@click.option(
    "--state", "states", multiple=True, type=click.Choice([*map(str, JobState)]), help="Only jobs in this state."
)
@click.option("--model", default="", metavar="MODEL", help="Only jobs of this model: name or name:version.")
@click.option("--tenant", default="", help="Only this tenant's jobs.")
@click.option(
    "--limit", type=click.IntRange(1, LISTED_JOBS), default=_USUAL, show_default=True, help="Jobs that are listed."
)
@click.option("--cursor", default="", help="Continue after an earlier list, with the cursor that it printed.")
@fleet_options
def jobs(*, states: tuple[str, ...], model: str, tenant: str, limit: int, cursor: str, fleet: AskedFleet) -> None:
    """List the fleet's jobs, most recently accepted first.

    Jobs that wait in arrivals are not listed: no router has seen them yet.
    """

    async def listed(client: AsyncClient) -> JobPage:
        """One list, fetched in as many pages as needed."""
        found, page = list[JobRecord](), JobPage(jobs=(), next=cursor)
        while page.next is not None and len(found) < limit:
            left = limit - len(found)
            page = await client.jobs(states=states, model=model, tenant=tenant, limit=left, cursor=page.next)
            found += page.jobs
        return JobPage(jobs=tuple(found), next=page.next)

    page = fleet.ask(listed)
    fleet.present(page if fleet.as_json else page.jobs, "show_jobs")
    if page.next is not None and not fleet.as_json:
        click.echo(f"more: --cursor {page.next}", err=True)


@click.command(epilog=_EXPLAIN_EXAMPLES)
@click.argument("job", metavar="[ID]", required=False)
@click.option("--what-if", metavar="MODEL", help="Explain a request to MODEL without submitting it.")
@request_options
@fleet_options
def explain(job: str | None, *, what_if: str | None, fleet: AskedFleet, **terms: Any) -> None:
    """Show why job ID was placed where it is: the reason, and the figures of every candidate and why it was not chosen.

    With --what-if, the same for a request in the fleet's current state, without submitting it; the options describe it.
    """
    if (job is None) == (what_if is None):
        raise click.UsageError("expected the ID of a job, or --what-if MODEL")
    if job is not None and any(value not in (None, (), {}) for value in terms.values()):
        raise click.UsageError("expected no request with a job ID; request options need --what-if MODEL")
    given = {name: terms.pop(name) for name in ("texts", "files", "as_text")}
    inputs = None if what_if is None else inputs_of(**given)

    async def explained(client: AsyncClient) -> dict[str, Any]:
        if what_if is None:
            return await client.job(str(job)).placement()
        return await client.what_if(what_if, inputs, **terms)

    fleet.present(fleet.ask(explained), "show_placement")


@click.command()
@click.argument("job", metavar="ID")
@fleet_options
def cancel(job: str, *, fleet: AskedFleet) -> None:
    """Cancel job ID before it is answered. Exits with 2 if it had already ended."""

    async def cancelled(client: AsyncClient) -> JobStatus:
        await client.job(job).cancel()
        return await client.job(job).status()

    status = fleet.ask(cancelled)
    state = status.state
    shown = {**msgspec.to_builtins(status), "cancelled": state == JobState.CANCELLED} if fleet.as_json else status
    fleet.present(shown, "show_status")
    if state not in FINAL:
        raise CommandError(
            f"job {job} is not cancelled yet", hint=f"`taxiway status {job}` shows its state", code=UNAVAILABLE
        )
    if state != JobState.CANCELLED:
        raise CommandError(f"job {job} had already ended: {state}", hint="", code=USAGE)


def _overview(fleet: AskedFleet) -> dict[str, Any]:
    """The fleet's overview; a local fleet's has its `processes`, which are shown even if no router answers.

    Raises:
        FleetUnavailable: no router answers.
    """
    processes = processes_here(fleet.url, fleet.data, os.environ)
    try:
        overview = fleet.ask(lambda client: client.fleet())
    except FleetUnavailable:
        if processes:
            from taxiway.cli.show import show_processes

            show_processes(processes)
        raise
    return {**overview, "processes": processes} if processes else overview


_LISTED_JOBS = 100


@click.group()
def dead() -> None:
    """Inspect, replay or drop dead letters.

    Dead letters are jobs that crashed their workers, and messages that no worker may run. Each verb takes --json.
    """


@dead.command("list")
@click.option("--most", type=click.IntRange(1, 1000), default=_LISTED_JOBS, show_default=True, help="How many to list.")
@fleet_options
def list_(*, most: int, fleet: AskedFleet) -> None:
    """List dead letters, most recent first."""
    fleet.present(fleet.ask(lambda client: client.dead.list(most)), "show_letters")


@dead.command()
@click.argument("id")
@fleet_options
def show(id: str, *, fleet: AskedFleet) -> None:
    """Show the one with that ID: its reason, the workers that its job crashed, and the message."""
    fleet.present(fleet.ask(lambda client: client.dead.show(id)), "show_letter")


@dead.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@fleet_options
def replay(ids: tuple[str, ...], *, fleet: AskedFleet) -> None:
    """Run the job of each again under the same id, and delete the dead letter.

    One that cannot be replayed does not keep the others from it.
    """
    jobs, refused = fleet.ask(lambda client: _each(ids, client.dead.replay))
    if fleet.as_json:
        print_json(jobs)
    else:
        for job in jobs.values():
            click.echo(job)
    _raise_last(refused)


@dead.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@fleet_options
def drop(ids: tuple[str, ...], *, fleet: AskedFleet) -> None:
    """Delete each. Its job stays dead."""
    dropped, refused = fleet.ask(lambda client: _each(ids, client.dead.drop))
    if fleet.as_json:
        print_json({"dropped": [*dropped]})
    _raise_last(refused)


async def _each(ids: Sequence[str], call: Callable[[str], Awaitable[T]]) -> tuple[dict[str, T], list[RequestError]]:
    """What the call answers to each id, and the refusals."""
    answers, refused = {}, list[RequestError]()
    for id in ids:
        try:
            answers[id] = await call(id)
        except RequestError as error:
            refused.append(error)
    return answers, refused


def _raise_last(refused: Sequence[RequestError]) -> None:
    """Report refusals, and raise the last."""
    for error in refused[:-1]:
        report(error.message, hint_for(error))
    if refused:
        raise refused[-1]


@click.command()
@click.argument("name", required=False)
@fleet_options
def models(name: str | None, *, fleet: AskedFleet) -> None:
    """List what the fleet can run, or only model NAME."""
    found = fleet.ask(lambda client: client.models())
    if name is not None:
        found = [model for model in found if model["name"] == name]
        if not found:
            raise UnknownModelError(f"unknown model {name!r}", model=name)
    fleet.present(found, "show_models")


_QUIET = 3.0  # seconds in which no job left a fleet that drains, after which the others stay


@click.command()
@click.option("--end", is_flag=True, help="Serve again.")
@fleet_options
def drain(*, end: bool, fleet: AskedFleet) -> None:
    """Hand the fleet's work to other fleets, its classes of `protocol: taxiway`.

    Waiting jobs whose locality allows it move there, as far as they are offered to be in time, and so does what comes;
    running jobs end here. Returns once no more leave, with the jobs that stay: they run here.
    """
    if end:
        fleet.echo(fleet.ask(lambda client: client.resume()), "it serves again")
        return
    peers = fleet.ask(lambda client: client.drain())["peers"]
    click.echo(f"work goes to {', '.join(peers)}; what stays is listed once no more leaves", err=True)
    fleet.present(fleet.ask(lambda client: _staying(client, peers)), "show_jobs")


async def _staying(client: AsyncClient, peers: Collection[str]) -> list[JobRecord]:
    """The jobs that wait here once none has left for a while, the latest first."""
    began = latest = (await client.fleet())["now"]
    now = began
    while now - latest < _QUIET:
        await asyncio.sleep(0.5)
        fleet = await client.fleet()
        now = fleet["now"]
        latest = max([began, *(move["at"] for move in fleet["moves"] if move["target"] in peers)])
    found: list[JobRecord] = []
    cursor: str | None = ""
    while cursor is not None:
        page = await client.jobs(states=("queued", "held"), cursor=cursor)
        found += (job for job in page.jobs if job.hardware_class not in peers)
        cursor = page.next
    return found

"""Prints an answer as it is generated."""

from __future__ import annotations

from contextlib import aclosing

import click

from taxiway.cli.address import print_json
from taxiway.client.asyncio_client import AsyncJob
from taxiway.contract.job import Result
from taxiway.contract.streaming import Event, Lost, Restarted


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

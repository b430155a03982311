"""`dead list|show|replay|drop`: dead letters."""

from __future__ import annotations

from pathlib import Path

import click

from taxiway.cli.address import ask, fleet_options, print_json
from taxiway.client.asyncio_client import AsyncClient

_MOST = 100


@click.group()
def dead() -> None:
    """Inspect, replay or drop dead letters.

    Dead letters are jobs that crashed their workers, and messages that no worker may run. Each verb takes --json.
    """


@dead.command("list")
@click.option("--most", type=click.IntRange(1, 1000), default=_MOST, show_default=True, help="Letters to list.")
@fleet_options
def list_(*, most: int, url: str | None, data: Path | None, as_json: bool) -> None:
    """List dead letters, most recent first."""
    letters = ask(url, data, lambda client: client.dead.list(most))
    if as_json:
        print_json(letters)
        return
    from taxiway.cli.show import show_letters

    show_letters(letters)


@dead.command()
@click.argument("letter")
@fleet_options
def show(letter: str, *, url: str | None, data: Path | None, as_json: bool) -> None:
    """Show a LETTER: its reason, the workers that its job crashed, and the message."""
    opened = ask(url, data, lambda client: client.dead.show(letter))
    if as_json:
        print_json(opened)
        return
    from taxiway.cli.show import show_letter

    show_letter(opened)


@dead.command()
@click.argument("letters", metavar="LETTER...", nargs=-1, required=True)
@fleet_options
def replay(letters: tuple[str, ...], *, url: str | None, data: Path | None, as_json: bool) -> None:
    """Run the job of each LETTER again under the same id, and delete the letter."""

    async def replayed(client: AsyncClient) -> dict[str, str]:
        return {letter: await client.dead.replay(letter) for letter in letters}

    jobs = ask(url, data, replayed)
    if as_json:
        print_json(jobs)
        return
    for job in jobs.values():
        click.echo(job)


@dead.command()
@click.argument("letters", metavar="LETTER...", nargs=-1, required=True)
@fleet_options
def drop(letters: tuple[str, ...], *, url: str | None, data: Path | None, as_json: bool) -> None:
    """Delete each LETTER. Its job stays dead."""

    async def dropped(client: AsyncClient) -> None:
        for letter in letters:
            await client.dead.drop(letter)

    ask(url, data, dropped)
    if as_json:
        print_json({"dropped": letters})

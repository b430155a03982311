"""`models`, `reload`: what the fleet can run."""

from __future__ import annotations

from pathlib import Path

import click

from taxiway.cli.address import ask, fleet_options, print_json
from taxiway.cli.failure import JOB_FAILED
from taxiway.errors import UnknownModelError


@click.command()
@click.argument("name", required=False)
@fleet_options
def models(name: str | None, *, url: str | None, data: Path | None, as_json: bool) -> None:
    """List what the fleet can run, or only model NAME."""
    found = ask(url, data, lambda client: client.models())
    if name is not None:
        found = [model for model in found if model["name"] == name]
        if not found:
            raise UnknownModelError(f"unknown model {name!r}", model=name)
    if as_json:
        print_json(found)
        return
    from taxiway.cli.show import show_models

    show_models(found)


@click.command()
@fleet_options
def reload(*, url: str | None, data: Path | None, as_json: bool) -> None:
    """Make every router and worker reread its models folder, and show what each serves.

    Most changes are detected within a second without this command. Exits with 1 if a process did not answer, or a model
    is disabled or served in an older version of its files.
    """
    processes = ask(url, data, lambda client: client.reload())
    if as_json:
        print_json(processes)
    else:
        from taxiway.cli.show import show_reload

        show_reload(processes)
    if any(not one["answered"] or one["disabled"] or one["outdated"] for one in processes):
        raise SystemExit(JOB_FAILED)

"""`taxiway models`: what the fleet can run, and what operators put in service or take out while it runs."""

from __future__ import annotations

import click

from taxiway.cli import JOB_FAILED
from taxiway.cli.address import AskedFleet, fleet_options, print_json
from taxiway.errors import UnknownModelError

_NAME = click.argument("name")


class _Models(click.Group):
    """Without a verb it lists: `taxiway models`, `taxiway models NAME`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The arguments, with the verb that they imply; a shell that completes them has not got it."""
        if not ctx.resilient_parsing and (not args or args[0] not in {*self.commands, *ctx.help_option_names}):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Models)
def models() -> None:
    """List what the fleet can run, load a model, unload one.

    `taxiway models [NAME]` lists. Each verb takes --json.
    """


@models.command("list")
@click.argument("name", required=False)
@fleet_options
def list_(name: str | None, *, fleet: AskedFleet) -> None:
    """List what the fleet can run, or only model NAME."""
    found = fleet.ask(lambda client: client.models())
    if name is not None:
        found = [model for model in found if model["name"] == name]
        if not found:
            raise UnknownModelError(f"unknown model {name!r}", model=name)
    fleet.present(found, "show_models")


@models.command()
@_NAME
@fleet_options
def load(name: str, *, fleet: AskedFleet) -> None:
    """Accept requests for model NAME, and load it on each class that can run it.

    NAME may have a version (NAME:2) or an alias (NAME@stable). Exits with 4 if no device has loaded it in time.
    """
    loaded = fleet.ask(lambda client: client.load_model(name))
    if fleet.as_json:
        print_json(loaded)
        return
    for hardware_class, what in loaded["classes"].items():
        click.echo(f"{hardware_class}: {what}")


@models.command()
@_NAME
@fleet_options
def unload(name: str, *, fleet: AskedFleet) -> None:
    """Accept no more requests for model NAME, or for its version NAME:2. Accepted jobs still run.

    It stays out of service until it is loaded. Exits with 1 if a process did not answer: that may still accept some.
    """
    done = fleet.ask(lambda client: client.unload_model(name))
    if fleet.as_json:
        print_json(done)
    else:
        click.echo(", ".join(f"{done['name']}:{version}" for version in done["versions"]))
        for process in done["unanswered"]:
            click.echo(f"{process} did not answer in time", err=True)
    if done["unanswered"]:
        raise SystemExit(JOB_FAILED)

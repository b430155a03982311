"""The root command. Its table names every verb, so that help needs no verb's module."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import click

from taxiway.cli.failure import EXIT_CODES, INTERRUPTED, CommandError, exit_code, hint_for, report
from taxiway.errors import TaxiwayError

COMMANDS = {
    "up": ("taxiway.cli.fleet", "Start a complete fleet on this machine."),
    "down": ("taxiway.cli.fleet", "Stop the fleet on this machine."),
    "doctor": ("taxiway.cli.fleet", "Report what this machine has, what is missing, and how to install it."),
    "submit": ("taxiway.cli.submit", "Send a request to a model and print its answer."),
    "result": ("taxiway.cli.jobs", "Print a job's answer."),
    "status": ("taxiway.cli.jobs", "Show a job or the fleet."),
    "jobs": ("taxiway.cli.jobs", "List jobs by state, model and tenant."),
    "top": ("taxiway.cli.top", "Show the whole fleet, live."),
    "explain": ("taxiway.cli.jobs", "Show why a job runs where it does."),
    "cancel": ("taxiway.cli.jobs", "Cancel a job before it is answered."),
    "dead": ("taxiway.cli.dead", "Inspect, replay or drop dead letters."),
    "models": ("taxiway.cli.models", "List what the fleet can run."),
    "check": ("taxiway.cli.fleet", "Check queues.yaml and the models."),
    "reload": ("taxiway.cli.models", "Make all processes reread their models folder."),
    "keys": ("taxiway.cli.fleet", "Create, list and revoke API keys of the HTTP door."),
    "profile": ("taxiway.cli.fleet", "Measure how models run on this machine."),
    "simulate": ("taxiway.cli.fleet", "Replay a trace on a modelled fleet."),
    "plan": ("taxiway.cli.fleet", "Find the cheapest instances that serve a load in time."),
    "completion": ("taxiway.cli.completion", "Print a shell's completion script."),
}
"""For each verb, the module with the command of the same name, and its help text."""


class Root(click.Group):
    """Imports a verb's module on use, and turns errors into messages and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, in order of typical use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command; None for an unknown verb."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of verbs."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, what) for name, (_, what) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of exit codes."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except TaxiwayError as error:
            report(error.message, hint_for(error))
            ctx.exit(exit_code(error))
        except CommandError as error:
            report(str(error), error.hint)
            ctx.exit(error.code)
        except KeyboardInterrupt:
            report("interrupted", "")
            ctx.exit(INTERRUPTED)


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"taxiway {importlib.metadata.version('taxiway')}")
        ctx.exit()


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def main() -> None:
    """Air traffic control for AI inference.

    One fleet of heterogeneous hardware; each request runs on the cheapest device that meets its deadline.
    """

"""`completion`: click's own completion scripts."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.option("--json", "as_json", is_flag=True, help="Print the script as JSON.")
@click.pass_context
def completion(ctx: click.Context, *, shell: str, as_json: bool) -> None:
    """Print SHELL's completion script. To use it now: `eval "$(taxiway completion bash)"`."""
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ctx.find_root().command, {}, "taxiway", "_TAXIWAY_COMPLETE").source()
    if as_json:
        from taxiway.cli.address import print_json

        print_json({"shell": shell, "script": script})
        return
    click.echo(script)

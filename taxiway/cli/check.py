"""`check`: looks at queues.yaml and the models, in the process that this one becomes."""

from __future__ import annotations

import click

from taxiway.cli.fleet import become, pairs


@click.command()
@click.option(
    "--models", metavar="DIR", help="Folder of models' folders [TAXIWAY_MODELS, else the checkout's models/]."
)
@click.option("--queues", metavar="FILE", help="[TAXIWAY_QUEUES, else the checkout's queues.yaml].")
@click.option("--run", "running", is_flag=True, help="Run an example of each variant too; weights are fetched.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def check(models: str | None, queues: str | None, *, running: bool, as_json: bool) -> None:
    """Check queues.yaml, the models, and their files that are on this machine, before a fleet runs by them.

    Exits with 1 where anything is wrong. `taxiway up` does the same first, without --run.
    """
    flags = [flag for flag, wanted in {"--run": running, "--json": as_json}.items() if wanted]
    files = [*pairs("--models", [models] if models else []), *pairs("--queues", [queues] if queues else [])]
    become("workers.check", [*flags, *files], verb="check")

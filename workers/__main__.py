"""`python -m workers --class cpu.batch --device cpu:0`: one worker process on one device."""

from __future__ import annotations

import os
import sys

import click

_THREADS = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
"""Waiting threads must not spin: other workers share the machine. OMP_NUM_THREADS is set from --threads."""

WRONG_SETTING = 2
"""Exit status for an invalid option, variable or file; `workers.worker` defines those of a running worker."""


@click.command()
@click.option("--class", "hardware_class", required=True, help="Hardware class to serve, by its name in queues.yaml.")
@click.option("--device", default="", help="Device to drive: cpu:0, cpu:0-3, cuda:0, tpu:0 [the class's first].")
@click.option("--emulate", is_flag=True, help="Serve the class on the CPU if its device is missing (emulated).")
@click.option("--name", default="", help="Name among the fleet's workers [class, device and this machine's name].")
@click.option("--threads", default=1, type=click.IntRange(min=1), help="Threads within one operation on the CPU.")
@click.option("--engine-port", default="", hidden=True, help="Port of the engine that was started with this worker.")
@click.option(
    "--usd-per-hour", envvar="TAXIWAY_USD_PER_HOUR", default="", help="Price of the node it is on [the class's]."
)
@click.option("--loglevel", default="INFO", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]))
def main(
    hardware_class: str,
    device: str,
    emulate: bool,
    name: str,
    threads: int,
    engine_port: str,
    usd_per_hour: str,
    loglevel: str,
) -> None:
    """Serve one hardware class on one device, until SIGTERM.

    Servers and files come from TAXIWAY_BROKER, TAXIWAY_SECRET, TAXIWAY_QUEUES, TAXIWAY_MODELS and
    TAXIWAY_CACHE.
    """
    os.environ |= _THREADS | {
        "OMP_NUM_THREADS": str(threads),
        "TAXIWAY_CLASS": hardware_class,
        "TAXIWAY_DEVICE": device,
        "TAXIWAY_EMULATE": "1" if emulate else "",
        "TAXIWAY_THREADS": str(threads),
        "TAXIWAY_ENGINE_PORT": engine_port,
        "TAXIWAY_USD_PER_HOUR": usd_per_hour,
    }
    from tasks.document import DocumentError  # now, not above: runtimes read OMP_NUM_THREADS when they are imported
    from tasks.settings import SettingsError

    try:
        from workers.app import app, serve
    except (SettingsError, DocumentError) as error:
        click.echo(f"{error}", err=True)
        sys.exit(WRONG_SETTING)
    sys.exit(serve(app, loglevel, name))


if __name__ == "__main__":
    main()

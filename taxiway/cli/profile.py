"""`profile`: measures this machine, in the process that this one becomes."""

from __future__ import annotations

from collections.abc import Sequence

import click

from taxiway.cli.fleet import become, pairs


@click.command()
@click.option("--model", "models", multiple=True, metavar="NAME", help="Model to measure; may be repeated [all].")
@click.option("--variant", "variants", multiple=True, metavar="NAME", help="Variant to measure; may be repeated [all].")
@click.option("--device", default="cpu:0", metavar="DEVICE", help="cpu:0, cuda:0 or tpu:0.", show_default=True)
@click.option("--quick", is_flag=True, help="About 12 seconds a variant instead of 60.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--output", metavar="DIR", help="Folder of models' folders to write to [the checkout's models/].")
def profile(
    models: Sequence[str],
    variants: Sequence[str],
    device: str,
    *,
    quick: bool,
    as_json: bool,
    output: str | None,
) -> None:
    """Measure how models run on this machine: load time, memory, and latency over batch and size.

    Writes DIR/<model>/profiles/<device>.yaml, which placement reads. Let nothing else run meanwhile.
    """
    flags = {"--quick": quick, "--json": as_json}
    arguments = [flag for flag, wanted in flags.items() if wanted]
    arguments += [*pairs("--model", models), *pairs("--variant", variants), "--device", device]
    become("workers.profiling", [*arguments, *pairs("--output", [output] if output else [])], verb="profile")

"""The verbs implemented by the fleet's packages: this process is replaced by theirs (exec)."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from taxiway.cli import INTERRUPTED, MISSING, CommandError, exit_with_reader, report

_NEEDED = ("celery", "kombu", "yaml", "litestar", "psutil")
"""Packages whose absence means that the checkout was not set up."""

_SHOWN_AS = "_TAXIWAY_SHOWN_AS"  # the name to show in usage lines, for the process started by `become`

_KEYS = """\b
new --tenant NAME --scope submit|read|admin … [--expires DAYS]
                 create a key and print it, once
list [--json]    list the keys, without their secrets
revoke ID        revoke a key: routers refuse it within a second
--file FILE      the keys file [TAXIWAY_KEYS]

The scopes are described in docs/security.md."""

_OWN = """--queues FILE    the fleet's queues.yaml [TAXIWAY_QUEUES, else the checkout's]
--url URL        the state store of the fleet whose devices have learned, redis://…
                 [TAXIWAY_BROKER, else the local fleet]
--data DIR       data directory of a local fleet [TAXIWAY_DATA, else .taxiway]
--status FILE    in place of a fleet: the output of `taxiway status --json`
--model NAME     the model of a trace that names none"""

_SIMULATE = f"""\b
--trace TRACE    a CSV file, such as `taxiway history export` writes, a UTC day, or
                 poisson:rate=50,duration=600,seed=1
{_OWN}
--fleet FILE     instead of queues.yaml: a fleet file, such as simulator/fleets/azure-mixed.yaml
--policy NAME    one policy [taxiway]; --compare runs them all
--load X         multiply the request rate by X
--seed N         seed of the random numbers
--json           one JSON object per policy
--plot FILE      a chart, one HTML file

The model is described in docs/simulator.md.
Trials, other policies and lower bounds are in the laboratory: lab/README.md."""

_PLAN = f"""\b
--trace TRACE    a CSV file, such as `taxiway history export` writes, a UTC day, or
                 poisson:rate=50,duration=600,seed=1
--rate MODEL=R   instead: R requests per second of a model, as in chat=5,service=live;
                 may be repeated
--slo SERVICE=SHARE
                 share to answer in time, such as live=0.95; may be repeated
{_OWN}
--fleet FILE     instead of queues.yaml: a fleet file, such as simulator/fleets/azure-plan.yaml
--prices FILE    for a fleet file: instance, accelerator, accelerator_count, usd_per_hour,
                 usd_per_hour_spot [simulator/fleets/prices.csv]
--seed N         seed of the random numbers
--json           one JSON object

The method is described in docs/planner.md."""

_DIFF_CONFIG = f"""\b
NEW/queues.yaml  the queues.yaml to try
--history TRACE  what arrived: a CSV file of `taxiway history export`, another trace, or a UTC day
{_OWN.replace("--queues FILE    the fleet's queues.yaml", "--old FILE       the one to compare it with")}
--sample SECONDS  how much to replay of a longer history, in windows spread over it [3600]; 0 replays all
--seed N         seed of the random numbers
--json           one JSON object: old, new and difference
--plot FILE      a chart, one HTML file

The figures are described in docs/simulator.md."""

_HISTORY = """\b
(nothing)      the last 24 hours by model and service
--day DAY      instead: a UTC day, such as 2026-11-27
export DAY     a day's arrivals as a trace for `taxiway diff-config` and `simulate`, a CSV file
--url URL      the state store, redis://… [TAXIWAY_BROKER, else the local fleet]
--data DIR     data directory of a local fleet [TAXIWAY_DATA, else .taxiway]
--json         one JSON object; with export one per job, with what became of it

What is recorded is described in docs/operations.md."""


class Described(click.Command):
    """A verb whose own package parses its arguments; its epilog has a row for each, and then a sentence.

    A row is an argument, two spaces or more, and its meaning; a row that begins with spaces continues the last one.
    """

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The rows, in the form of other verbs' options."""
        rows: list[tuple[str, str]] = []
        for line in self._parts()[0].splitlines():
            argument, _, meaning = re.sub(r"  +", "\0", line, count=1).partition("\0")
            begun, before = (argument, "") if argument else rows.pop()
            rows.append((begun, f"{before} {meaning}".strip()))
        rows.append(("-h, --help", "Show this message and exit."))
        with formatter.section("Options"):
            formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The sentence."""
        formatter.write_paragraph()
        formatter.write_text(self._parts()[1])

    def _parts(self) -> tuple[str, str]:
        rows, _, sentence = (self.epilog or "").removeprefix("\b\n").partition("\n\n")
        return rows, sentence


_data = click.option("--data", metavar="DIR", help="Data directory [TAXIWAY_DATA, else .taxiway].")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


@click.command()
@_data
@_json
@click.option("--detach", is_flag=True, help="Return once everything is ready; `taxiway down` stops it.")
@click.option("--emulate", multiple=True, metavar="CLASS", help="Serve this class on the CPU, marked as emulated.")
@click.option("--workers", multiple=True, metavar="CLASS=N", help="Worker processes of a class.")
@click.option("--autoscale", is_flag=True, help="Run as many workers as there is work for, within the cores.")
@click.option("--flower/--no-flower", default=True, help="Whether to start Flower.")
@click.option("--flower-port", metavar="PORT", help="Flower's port [5555, or a free one].")
@click.option("--port", metavar="PORT", help="The router's HTTP port [8080, or a free one].")
@click.option("--fetch/--no-fetch", default=True, help="Whether to fetch missing weights first.")
def up(**_: Any) -> None:
    """Start the broker, a router, workers and Flower on this machine, and keep them running."""
    become("local", ["up", *_given()], verb="up")


@click.command()
@_data
@_json
def down(**_: Any) -> None:
    """Stop the fleet on this machine."""
    become("local", ["down", *_given()], verb="down")


@click.command()
@click.argument("named", metavar="[PROCESS|CLASS]", required=False)
@_data
@_json
def restart(*, named: str | None, **_: Any) -> None:
    """Restart the processes of the fleet on this machine one after another: the router, then workers, then Flower.

    Each is ready again before the next is asked to end, and a worker finishes its jobs or returns them. With an
    argument, only that PROCESS of `taxiway status`, or the workers of that CLASS. The embedded broker is left alone.
    """
    become("local", ["restart", *([named] if named else []), *_given()], verb="restart")


@click.command()
@_data
@_json
def doctor(**_: Any) -> None:
    """Report what this machine has, what is missing, how to install it, and the state of the local fleet."""
    become("local", ["doctor", *_given()], verb="doctor")


@click.command()
@click.option("--models", metavar="DIR", help="Models folder [TAXIWAY_MODELS, else the checkout's models/].")
@click.option("--queues", metavar="FILE", help="Fleet configuration [TAXIWAY_QUEUES, else the checkout's queues.yaml].")
@click.option("--run", "running", is_flag=True, help="Also run an example of each variant; fetches weights.")
@click.option("--show", is_flag=True, help="Print queues.yaml with every default, if it is valid.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def check(**_: Any) -> None:
    """Check queues.yaml, the models, and those of their files that are on this machine.

    Exits with 1 if anything is wrong. `taxiway up` runs the same checks first, without --run.
    """
    become("workers.check", _given(), verb="check")


@click.command(cls=Described, context_settings={"ignore_unknown_options": True}, options_metavar="", epilog=_KEYS)
@click.argument("arguments", metavar="new|list|revoke [...]", nargs=-1, type=click.UNPROCESSED)
def keys(arguments: tuple[str, ...]) -> None:
    """Create, list and revoke API keys of the HTTP API."""
    become("api.keys_file", list(arguments), verb="keys")


@click.command()
@click.option("--model", "models", multiple=True, metavar="NAME", help="Model to measure; may be repeated [all].")
@click.option("--variant", "variants", multiple=True, metavar="NAME", help="Variant to measure; may be repeated [all].")
@click.option("--device", default="cpu:0", metavar="DEVICE", help="cpu:0, cuda:0 or tpu:0.", show_default=True)
@click.option("--endpoint", metavar="CLASS", help="Measure the endpoint of a class, not this machine.")
@click.option("--quick", is_flag=True, help="About 12 seconds per variant instead of 60.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--output", metavar="DIR", help="Models folder to write to [the checkout's models/].")
def profile(**_: Any) -> None:
    """Measure how models run on this machine: load time, memory, and latency over batch and size.

    Writes DIR/<model>/profiles/<device>.yaml, which placement reads. Run nothing else at the same time.
    """
    become("workers.profiling", _given(), verb="profile")


@click.command(cls=Described, context_settings={"ignore_unknown_options": True}, options_metavar="", epilog=_SIMULATE)
@click.argument("arguments", metavar="--trace TRACE [...]", nargs=-1, type=click.UNPROCESSED)
def simulate(arguments: tuple[str, ...]) -> None:
    """Replay a trace on the fleet of a queues.yaml, or a trial's, under taxiway's placement and other policies."""
    become("simulator", ["simulate", *arguments], verb="simulate")


@click.command(
    "diff-config",
    cls=Described,
    context_settings={"ignore_unknown_options": True},
    options_metavar="",
    epilog=_DIFF_CONFIG,
)
@click.argument("arguments", metavar="NEW/queues.yaml --history TRACE [...]", nargs=-1, type=click.UNPROCESSED)
def diff_config(arguments: tuple[str, ...]) -> None:
    """Show what a history would have cost and attained under another queues.yaml."""
    become("simulator", ["diff-config", *arguments], verb="diff-config")


@click.command(cls=Described, context_settings={"ignore_unknown_options": True}, options_metavar="", epilog=_PLAN)
@click.argument("arguments", metavar="--trace TRACE --slo SERVICE=SHARE [...]", nargs=-1, type=click.UNPROCESSED)
def plan(arguments: tuple[str, ...]) -> None:
    """Find the cheapest devices that serve a load in time, and verify them by simulation."""
    become("simulator", ["plan", *arguments], verb="plan")


@click.command(cls=Described, context_settings={"ignore_unknown_options": True}, options_metavar="", epilog=_HISTORY)
@click.argument("arguments", metavar="[export DAY] [...]", nargs=-1, type=click.UNPROCESSED)
def history(arguments: tuple[str, ...]) -> None:
    """Show what arrived at the fleet and what became of it, or export it as a trace."""
    become("simulator.history", list(arguments), verb="history")


def find_tree(places: Iterable[Path]) -> Path:
    """The first of `places` that is a checkout of taxiway.

    Raises:
        CommandError: there is none.
    """
    for place in places:
        if (place / "local" / "__main__.py").is_file() and (place / "queues.yaml").is_file():
            return place.resolve()
    raise CommandError(
        "only taxiway's client is installed here: the fleet (router, workers, models) runs from a checkout",
        hint="clone taxiway's repository, run `make setup` there, then `.venv/bin/taxiway up` in it",
        code=MISSING,
    )


def become(module: str, arguments: Sequence[str], *, verb: str) -> NoReturn:
    """Replace this process by `python -m module`, so that signals and exit codes are the module's own.

    Raises:
        CommandError: the fleet's code or packages are missing.
    """
    tree = find_tree([Path(__file__).parents[2], Path.cwd()])
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"the fleet's packages are not installed for {sys.executable}: {', '.join(missing)}",
            hint=f"run `make setup` in {tree}, then `{tree}/.venv/bin/taxiway {verb}`",
            code=MISSING,
        )
    path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
    shown = "taxiway" if arguments[:1] == [verb] else f"taxiway {verb}"
    command = [sys.executable, "-P", "-m", module, *arguments]  # -P: do not import a `tasks` in the current folder
    sys.stdout.flush()
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path, _SHOWN_AS: shown})


def run(command: click.Command, name: str) -> NoReturn:
    """Run a verb's own command line, in usage lines by the name that the user typed, else by `name`; then exit."""
    shown = os.environ.pop(_SHOWN_AS, name)
    with exit_with_reader():
        try:
            status = command.main(prog_name=shown, standalone_mode=False)
        except click.ClickException as error:
            error.show()
            status = error.exit_code
        except click.Abort:
            report("interrupted", "")
            status = INTERRUPTED
        sys.exit(status)


def pairs(option: str, values: Iterable[str]) -> list[str]:
    """Command-line arguments that repeat the option for each value."""
    return [text for value in values for text in (option, value)]


def _given() -> list[str]:
    """The options on the command line, as arguments; those with an empty value are left out."""
    context, arguments = click.get_current_context(), list[str]()
    for option in context.command.params:
        if isinstance(option, click.Argument):
            continue
        value = context.params[option.name or ""]
        if context.get_parameter_source(option.name or "") is not ParameterSource.COMMANDLINE:
            continue
        if isinstance(value, bool):
            arguments += (option.opts if value else option.secondary_opts)[:1]
        else:
            arguments += pairs(option.opts[0], value if isinstance(value, tuple) else filter(None, [value]))
    return arguments

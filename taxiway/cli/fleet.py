"""The verbs implemented by the fleet's packages: this process is replaced by theirs (exec)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import click
from click.shell_completion import CompletionItem, ShellComplete

from taxiway.cli import CONTEXT, INTERRUPTED, MISSING, CommandError, exit_with_reader, report

_NEEDED = ("celery", "kombu", "yaml", "litestar", "psutil")
"""Packages whose absence means that the checkout was not set up."""

_SHOWN_AS = "_TAXIWAY_SHOWN_AS"  # the name to show in usage lines, for the process started by `become`


class FleetVerb(click.Command):
    """A verb that a module of the fleet runs, which parses the arguments and prints the help.

    `run_by` is the module, and its own verb if it has several: `local up`.
    """

    def __init__(self, verb: str, run_by: str) -> None:
        super().__init__(verb)
        self._verb = verb
        self._module, *self._first = run_by.split()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leave all arguments as they are."""
        ctx.args = args
        return args

    def invoke(self, ctx: click.Context) -> NoReturn:
        """Run the module in place of this process."""
        become(self._module, [*self._first, *ctx.args], verb=self._verb)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """What the module completes; nothing where only the client is installed."""
        try:
            package = hasattr(importlib.import_module(self._module), "__path__")
            module = importlib.import_module(f"{self._module}.__main__" if package else self._module)
        except ImportError:
            return []
        return ShellComplete(module.main, {}, self._verb, "").get_completions([*self._first, *ctx.args], incomplete)


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
            status = command.main(prog_name=shown, standalone_mode=False, **CONTEXT)
        except click.ClickException as error:
            error.show()
            status = error.exit_code
        except click.Abort:
            report("interrupted", "")
            status = INTERRUPTED
        sys.exit(status)

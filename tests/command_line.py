"""Programs of the tree: the command line in the test's own process, and any of them as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from click import Command
from click.testing import CliRunner, Result

from tasks.settings import TREE, Settings
from taxiway.cli import main


class CommandLine:
    """`taxiway` or another command, called with its arguments."""

    def __init__(self, command: Command = main) -> None:
        self._command = command

    def __call__(self, *arguments: str, **settings: Any) -> Result:
        """What a command printed, and its exit code; `settings` are those of `CliRunner.invoke`."""
        with mock.patch.dict(os.environ):  # what a command sets for its own process does not stay for other tests
            return CliRunner().invoke(self._command, arguments, **settings)

    def succeed(self, *arguments: str, **settings: Any) -> Result:
        """What a command printed that must exit with 0."""
        answer = self(*arguments, **settings)
        assert answer.exit_code == 0, answer.output
        return answer


def program(
    module: str, *arguments: str, settings: Settings | None = None, folder: Path = TREE, **variables: str
) -> subprocess.CompletedProcess[str]:
    """What `python -m MODULE` printed, and its exit status; under a fleet's settings if there are any."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    environment = {**os.environ, **(settings.environment() if settings else {}), **variables}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )

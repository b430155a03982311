"""The command line in the test's own process."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

from taxiway.cli import main


class CommandLine:
    """`taxiway`, called with its arguments."""

    def __call__(self, *arguments: str, **settings: Any) -> Result:
        """What a command printed, and its exit code; `settings` are those of `CliRunner.invoke`."""
        return CliRunner().invoke(main, arguments, **settings)

    def succeed(self, *arguments: str, **settings: Any) -> Result:
        """What a command printed that must exit with 0."""
        answer = self(*arguments, **settings)
        assert answer.exit_code == 0, answer.output
        return answer

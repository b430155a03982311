"""The command line: one file a group of verbs, imported when one is asked for. Data to stdout, the rest to stderr."""

from taxiway.cli.group import main

__all__ = ["main"]

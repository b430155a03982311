"""The command line: one module per group of verbs, imported on use. Data goes to stdout, everything else to stderr."""

from taxiway.cli.group import main

__all__ = ["main"]

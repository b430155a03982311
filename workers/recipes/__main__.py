"""`python -m workers.recipes FUNCTION --output PATH [--options JSON] NAME=PATH …`: write one derived artefact."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tasks.models.files import Code


def main() -> None:
    """Run the recipe that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m workers.recipes", description=__doc__)
    parser.add_argument("function", help="<module>:<function> or <path>.py:<function>")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--options", type=json.loads, default={}, help="the recipe's options, as a JSON object")
    parser.add_argument("inputs", nargs="*", metavar="NAME=PATH", help="the recipe's inputs")
    given = parser.parse_intermixed_args()
    inputs = {name: Path(path) for name, path in (item.split("=", 1) for item in given.inputs)}
    Code(given.function).load()(inputs, given.output, given.options)


if __name__ == "__main__":
    main()

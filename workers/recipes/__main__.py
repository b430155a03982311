"""`python -m workers.recipes RECIPE --output PATH [--options JSON] NAME=PATH …`: write one derived artefact."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path


def main() -> None:
    """Run the recipe that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m workers.recipes", description=__doc__)
    parser.add_argument("recipe", help="a module of workers.recipes")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--options", type=json.loads, default={}, help="the recipe's options, as a JSON object")
    parser.add_argument("inputs", nargs="*", metavar="NAME=PATH", help="the recipe's inputs")
    given = parser.parse_intermixed_args()
    inputs = {name: Path(path) for name, path in (item.split("=", 1) for item in given.inputs)}
    recipe = importlib.import_module(f"workers.recipes.{given.recipe}")
    recipe.make(inputs, given.output, given.options)


if __name__ == "__main__":
    main()

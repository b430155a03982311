"""What the fuzzers share: their options, a store, and what is said."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from local.embedded import EmbeddedValkey
from tasks.settings import Settings, settings_from


def options(name: str, about: str | None, **amounts: int) -> argparse.Namespace:
    """A seed, and how much of what, with these defaults."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.fuzzing.{name}", description=about)
    for amount, usual in amounts.items():
        parser.add_argument(
            f"--{amount}", type=int, default=usual, help="how long" if amount == "seconds" else "how many"
        )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32), help="decides all chance")
    return parser.parse_args()


@contextmanager
def a_store(folder: Path) -> Iterator[Settings]:
    """Settings of a fleet with a store and a secret of its own."""
    with EmbeddedValkey(folder / "valkey") as server:
        yield settings_from({"TAXIWAY_BROKER": server.url, "TAXIWAY_SECRET": secrets.token_hex(32)})


def say(seed: int, answers: Mapping[str, int], faults: list[str], *figures: str) -> int:
    """Print how a run went; 1 where something did harm."""
    stated = [f"seed {seed}", f"answers: {dict(sorted(answers.items()))}", *figures, *(faults[:10] or ["no harm"])]
    sys.stdout.write("; ".join(stated) + "\n")
    return int(bool(faults))

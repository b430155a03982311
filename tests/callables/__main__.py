"""A worker that also finds the tests' Python functions: `python -m tests.callables --class cpu.batch`."""

from __future__ import annotations

from tests import callables as own
from workers import callables
from workers.__main__ import main

if __name__ == "__main__":
    callables.__path__.extend(own.__path__)
    main()

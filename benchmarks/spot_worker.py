"""A worker that also finds the Python functions of benchmarks: `python -m benchmarks.spot_worker --class cpu.spot`."""

from __future__ import annotations

from benchmarks import callables as own
from workers import callables
from workers.__main__ import main

if __name__ == "__main__":
    callables.__path__.extend(own.__path__)
    main()

"""A worker that also finds the suite's Python functions, and whose memory is bounded as a container's is.

`python -m tests.chaos.worker --class cpu.batch`.
"""

from __future__ import annotations

import resource

from tests.chaos import callables as own
from workers import callables
from workers.__main__ import main

ADDRESSES = 3 * 2**29
"""Bytes of address space: a worker that runs small models uses half."""

if __name__ == "__main__":
    callables.__path__.extend(own.__path__)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    main()

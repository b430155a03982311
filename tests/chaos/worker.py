"""A worker with a memory limit, as in a container.

`python -m tests.chaos.worker --class cpu.batch`.
"""

from __future__ import annotations

import resource

from workers.__main__ import main

ADDRESSES = 3 * 2**29
"""Bytes of address space; a worker with small models uses half."""

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    main()

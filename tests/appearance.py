"""`python -m tests.appearance STATUS`: a line about this process as its program sees it, then it ends with STATUS."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    seen = {
        "arguments": sys.argv[1:],
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "session": [os.getsid(0), os.getpgrp()],
        "umask": os.umask(0o22),
        "signals": [str(signal.getsignal(number)) for number in signal.valid_signals()],
        "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "descriptors": sorted(one.name for one in Path("/proc/self/fd").iterdir() if one.exists()),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "buffering": [sys.stdout.line_buffering, sys.stderr.line_buffering],
        "warnings": sys.warnoptions,
        "name": sys.modules["__main__"].__spec__.name,  # type: ignore[union-attr]
    }
    sys.stdout.write(json.dumps([seen, random.random(), list(sys.modules)]) + "\n")
    sys.stderr.write("the end\n")
    sys.exit(int(sys.argv[1]))

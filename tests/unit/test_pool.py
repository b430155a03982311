from __future__ import annotations

import subprocess
import sys

from tasks.settings import TREE
from workers.celery_adapter.pool import BROKEN

FAILING = """
import time
from workers.celery_adapter.pool import _thread

def body():
    raise ValueError("the loop broke")

_thread("finisher", body)
time.sleep(20)
"""


def test_a_process_ends_when_one_of_its_loops_fails_and_says_why() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING], cwd=TREE, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == BROKEN
    assert "the loop broke" in done.stderr

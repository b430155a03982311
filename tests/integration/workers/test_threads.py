from __future__ import annotations

import subprocess
import sys

from tasks.settings import TREE
from workers.worker import BROKEN

FAILING = """
import time
from workers.worker import start_thread

def body():
    raise ValueError("the loop broke")

start_thread("finish", body)
time.sleep(20)
"""


def test_a_process_ends_when_one_of_its_loops_fails_and_says_why() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING], cwd=TREE, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == BROKEN
    assert "the loop broke" in done.stderr

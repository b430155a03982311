"""A result as Celery reads it where taxiway is not installed."""

import subprocess
import sys

from taxiway.contract.job import failure_meta
from taxiway.errors import InvalidRequestError


def test_celery_raises_an_error_of_that_name_where_taxiway_is_not_installed() -> None:
    program = f"""
import sys
sys.modules["taxiway"] = None
from celery import Celery
backend = Celery("plain", broker="memory://", backend="cache+memory://").backend
meta = backend.meta_from_decoded(backend.decode({failure_meta("job-1", InvalidRequestError("no such field"))!r}))
print(meta["status"], type(meta["result"]).__name__, meta["result"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=2) == ["FAILURE", "InvalidRequestError", "no such field\n"]

"""Runs a batch row by row on a runtime whose rows can be ended one by one: each succeeds or fails alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from taxiway.errors import ExecutionError, TaxiwayError
from workers.calling import CallError, NotWantedError, OutOfMemoryError
from workers.decide.faults import describe
from workers.executor import Executor, Loaded
from workers.pipelines import Item, Row
from workers.runtimes import Interruptible, Watch

logger = logging.getLogger(__name__)

Answer = Row | TaxiwayError | None
"""A row's answer, or why it has none; None for a row that is still to run, or that nobody waits for any more."""


@dataclass(slots=True)
class WatchedItem:
    """A row, and who waits for it."""

    item: Item
    watch: Watch


def run_rows(executor: Executor, loaded: Loaded, runtime: Interruptible, rows: Sequence[WatchedItem]) -> list[Answer]:
    """An answer for each row, in order. Once the runtime's process is gone the rest is still to run."""
    executor.used(loaded)
    answers: list[Answer] = [None] * len(rows)
    failed: set[str] = set()
    seconds = 0.0
    for index, row in enumerate(rows):
        if not runtime.alive:
            break
        if row.watch.job in failed:
            continue  # its job has ended with another row
        began = time.monotonic()
        answers[index] = answer = _run(loaded, runtime, row)
        if isinstance(answer, TaxiwayError):
            failed.add(row.watch.job)
        elif answer is not None:
            seconds += time.monotonic() - began
    good = [(row.item, answer) for row, answer in zip(rows, answers, strict=True) if _is_answer(answer)]
    if good:
        items, given = zip(*good, strict=True)
        executor.observe(loaded, items, given, rows=len(items), seconds=seconds)
    return answers


def _is_answer(answer: Answer) -> bool:
    return answer is not None and not isinstance(answer, TaxiwayError)


def _run(loaded: Loaded, runtime: Interruptible, row: WatchedItem) -> Answer:
    if not row.watch.wanted():
        return None
    try:
        (answer,) = loaded.pipeline.run(runtime.watched(row.watch), [row.item])
    except NotWantedError:
        logger.info("a call was ended", extra={"variant": loaded.key, "job": row.watch.job})
        return None
    except TaxiwayError as error:
        if _deserves_another(error.__cause__, row.item):
            row.item.starved = True
            return None
        return _failed(loaded, row.watch.job, error)
    except BaseException as error:  # a pipeline's own code may raise anything, SystemExit too
        return _failed(loaded, row.watch.job, ExecutionError(f"{loaded.key}: {describe(error)}"))
    return answer


def _deserves_another(cause: BaseException | None, item: Item) -> bool:
    """Whether a row that was out of memory runs once more, in a new process: what ran before it may have kept that."""
    return isinstance(cause, OutOfMemoryError) and cause.calls > 0 and not item.starved


def _failed(loaded: Loaded, job: str, error: TaxiwayError) -> TaxiwayError:
    """The error, which the log has with the callable's own traceback."""
    traceback = error.__cause__.traceback if isinstance(error.__cause__, CallError) else ""
    extra = {"job": job, "variant": loaded.key, "error": error.message}
    logger.warning("a callable failed", extra=extra | ({"traceback": traceback} if traceback else {}))
    return error

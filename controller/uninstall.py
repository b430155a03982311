"""`python -m controller.uninstall SELECTOR`: deletes HardwareClasses and waits until the operator has drained them.

The chart runs it before it removes a release. Classes that are not drained in time lose their finalizers, so that
nothing blocks the removal of a namespace indefinitely.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence

import msgspec

from controller.cluster import CLASSES, FINALIZER, UNANSWERED, Cluster, ConflictError, Object, find_access
from controller.spec import ClassSpec, longest_grace

CHECK_EVERY = 1.0
"""Seconds between two checks of the remaining classes."""

logger = logging.getLogger(__name__)


async def uninstall(cluster: Cluster, selector: str) -> None:
    """Delete the classes with these labels, and return once none is left."""
    classes = await cluster.objects(CLASSES, selector)
    end = time.monotonic() + max([0.0, *[await _timeout(cluster, one) for one in classes]])
    for one in classes:
        await cluster.delete(CLASSES, one["metadata"]["name"])
    while left := await cluster.objects(CLASSES, selector):
        if time.monotonic() > end:
            await _give_up(cluster, left)
        await asyncio.sleep(CHECK_EVERY)


async def _timeout(cluster: Cluster, body: Object) -> float:
    """Seconds that the drain of a class takes at most."""
    with contextlib.suppress(msgspec.ValidationError):
        spec = msgspec.convert(body["spec"], ClassSpec)
        return spec.drain + longest_grace(await cluster.objects("pods", spec.selector))
    return 0.0


async def _give_up(cluster: Cluster, left: Sequence[Object]) -> None:
    for one in left:
        logger.warning("class was not drained in time: %s", one["metadata"]["name"])
        others = [name for name in one["metadata"].get("finalizers", []) if name != FINALIZER]
        with contextlib.suppress(ConflictError):  # tried again with the next check
            await cluster.finalize(one, others)


async def _main(selector: str) -> None:
    cluster = Cluster(find_access(os.environ))
    try:
        await uninstall(cluster, selector)
    except UNANSWERED as error:
        sys.exit(f"uninstall: the API server does not answer: {error}")
    finally:
        await cluster.close()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))

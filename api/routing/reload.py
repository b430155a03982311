"""Has every router and worker read its models folder now, and says what each serves."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec

from api.routing.stores import OperatorStore
from router.service.snapshot_reader import FolderWatch
from tasks.models.folder import CatalogueReport, changes

ANSWER_WITHIN = 10.0
"""Seconds that a reload request waits for the running processes; one that loads a large file may take longer."""

_POLL = 0.1  # seconds between two checks of other processes' reports


async def reload(folder: FolderWatch, operators: OperatorStore) -> dict[str, Any]:
    """Have every process reload now; returns what each of them serves then, and what changed there.

    Raises:
        BrokerUnavailableError: the state store does not answer.
    """
    before = await operators.catalogues()
    wanted = await operators.request_reload()
    folder.hurry()
    after: dict[str, CatalogueReport] = {}
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ANSWER_WITHIN):
            while not after or any(report.reload < wanted for report in after.values()):
                await asyncio.sleep(_POLL if after else 0)
                after = await operators.catalogues()
    return {"processes": [_shown(name, before.get(name), report, wanted) for name, report in sorted(after.items())]}


def _shown(name: str, before: CatalogueReport | None, after: CatalogueReport, wanted: int) -> dict[str, Any]:
    differ = changes(after.models if before is None else before.models, after.models)
    return {
        "process": name,
        "kind": after.kind,
        "answered": after.reload >= wanted,
        "models": sorted(after.models),
        **differ,
        "disabled": msgspec.to_builtins(after.disabled),
        "outdated": msgspec.to_builtins(after.outdated),
        "queues_changed": after.queues_changed,
        "queues_wrong": after.queues_wrong,
    }

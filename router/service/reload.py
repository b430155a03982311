"""Keeps a router's catalogue and profiles in step with the models folder, and asks all processes to reload theirs."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec

from router.service.admission import Rules
from router.service.snapshot_reader import FleetReader
from router.service.store import Store
from tasks.models.folder import LOOK, ModelsFolder, Report, Reporter, changes
from taxiway.errors import BrokerUnavailableError

ANSWER_WITHIN = 10.0
"""Seconds that a reload request waits for the running processes; one that loads a large file may take longer."""

_POLL = 0.1  # seconds between two reads of the other processes' reports


class FolderWatch:
    """Checks the folder once a second, and at once on request."""

    def __init__(self, folder: ModelsFolder, rules: Rules, fleet: FleetReader, store: Store, name: str) -> None:
        self.folder = folder
        self._rules = rules
        self._fleet = fleet
        self._store = store
        self._reporter = Reporter(folder, "router", name)
        self._now = asyncio.Event()

    async def run(self) -> None:
        """Check indefinitely."""
        while True:
            await self._report()
            asked = self._reporter.asked
            if await asyncio.to_thread(self.folder.look, closely=asked):
                self._rules.renew(self.folder.catalogue, self.folder.book)
                self._fleet.renew(self.folder.book)
            if asked:
                self._reporter.looked()
                continue  # report it at once: the reload request waits for it
            self._now.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._now.wait(), LOOK)

    async def reload(self) -> dict[str, Any]:
        """Have every process reload now; returns what each of them serves then, and what changed there.

        Raises:
            BrokerUnavailableError: the state store does not answer.
        """
        before = await self._store.catalogues()
        wanted = await self._store.ask_reload()
        self._now.set()
        after = before
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_WITHIN):
                while not after or any(report.reload < wanted for report in after.values()):
                    await asyncio.sleep(_POLL)
                    after = await self._store.catalogues()
        processes = [_shown(name, before.get(name), report, wanted) for name, report in sorted(after.items())]
        return {"processes": processes}

    async def _report(self) -> None:
        """Report to the store what is served. During an outage, which another loop logs, the folder is still read."""
        with contextlib.suppress(BrokerUnavailableError):
            self._reporter.heard(await self._store.watch(self._reporter.arguments()))


def _shown(name: str, before: Report | None, after: Report, wanted: int) -> dict[str, Any]:
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
    }

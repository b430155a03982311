"""Keeps a router's catalogue and profiles as the models folder has them, and asks all processes to look at theirs."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec

from router.service.admission import Rules
from router.service.snapshot_reader import FleetReader
from router.service.store import Store
from tasks.models.folder import LOOK, ModelsFolder, changes
from tasks.reload import Report, Reporter
from taxiway.errors import BrokerUnavailableError

ANSWER_WITHIN = 10.0
"""Seconds that who asks for a reload waits for the processes that run; one that loads a large file may take longer."""

_GLANCE = 0.1  # seconds between two looks at what the others tell meanwhile


class FolderWatch:
    """Looks at the folder once a second, and at once when somebody asks."""

    def __init__(self, folder: ModelsFolder, rules: Rules, fleet: FleetReader, store: Store, name: str) -> None:
        self.folder = folder
        self._rules = rules
        self._fleet = fleet
        self._store = store
        self._reporter = Reporter(folder, "router", name)
        self._now = asyncio.Event()

    async def run(self) -> None:
        """Look indefinitely."""
        while True:
            await self._tell()
            asked = self._reporter.asked
            if await asyncio.to_thread(self.folder.look, closely=asked):
                self._rules.renew(self.folder.catalogue, self.folder.book)
                self._fleet.renew(self.folder.book)
            if asked:
                self._reporter.looked()
                continue  # whoever asked waits for that to be told
            self._now.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._now.wait(), LOOK)

    async def reload(self) -> dict[str, Any]:
        """Have every process look now; what each of them serves then, and what changed there.

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
                    await asyncio.sleep(_GLANCE)
                    after = await self._store.catalogues()
        processes = [_shown(name, before.get(name), report, wanted) for name, report in sorted(after.items())]
        return {"processes": processes}

    async def _tell(self) -> None:
        """Tell the store what is served; while it is away, which the consuming loop reports, the folder is read on."""
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

"""Loads and unloads models on an operator's request, and reloads the models folders, while the fleet runs.

An unloaded model stays in the catalogue, so that accepted jobs still run, move and can be read. The state store has the
last request for each version (`CONTROLS`); every router and worker learns of it within a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from api.routing.stores import OperatorStore
from router.decide.classify import Constraints, classify
from router.decide.snapshot import FleetSnapshot
from router.service.admission import Rules
from router.service.snapshot_reader import FleetReader, FolderWatch
from tasks.models.folder import CatalogueReport, changes
from tasks.models.model import Model
from tasks.topology import Topology
from taxiway.errors import InvalidRequestError, ModelUnavailableError, quoted

logger = logging.getLogger(__name__)

ANSWER_WITHIN = 10.0
"""Seconds that a reload request waits for the running processes; one that loads a large file may take longer."""

LOAD_WITHIN = 50.0
"""Seconds that a caller waits for a load, which continues after that: Triton's clients time out after 60."""

_POLL = 0.1  # seconds between two checks of the devices, or of other processes' reports


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """A load on one class's devices: how many have the model, how many may still load it, and why others do not."""

    loaded: int
    pending: int
    reason: str = ""

    @property
    def text(self) -> str:
        """In words."""
        if self.loaded:
            return f"loaded on {self.loaded} of {self.loaded + self.pending} devices"
        return self.reason or "not loaded yet: it is still loading, or other models use the memory that it needs"


def progress(
    model: Model, topology: Topology, fleet: FleetSnapshot, reporting: Collection[str] | None = None
) -> dict[str, LoadProgress]:
    """How far the load of a model is, by the classes that can run it; only reports of workers in `reporting` count."""
    candidates, refusals = classify(model, Constraints(), topology, fleet)
    reasons: dict[str, list[str]] = defaultdict(list)
    for refusal in refusals:
        if not refusal.ever:
            reasons[refusal.hardware_class].append(f"{refusal.variant}: {refusal.reason}")
    able: dict[str, set[str]] = {name: set() for name in reasons}
    for candidate in candidates:
        able.setdefault(candidate.hardware_class, set()).update(device.worker for device in candidate.devices)
    found = {}
    for name, workers in sorted(able.items()):
        devices = fleet.own(name)
        silent = {device.worker for device in devices if reporting is not None and device.worker not in reporting}
        loaded = {device.worker for device in devices if _has(device.warm, model)} - silent
        pending = {device.worker for device in devices if device.worker in workers | silent} - loaded
        reason = "" if loaded or pending else "; ".join(reasons.get(name, ())) or "no live device"
        found[name] = LoadProgress(len(loaded), len(pending), reason)
    return found


def _has(warm: Collection[str], model: Model) -> bool:
    return any(key.startswith(f"{model.id}/") for key in warm)


class Repository:
    """The fleet's models as an operator controls them, at any router."""

    def __init__(self, rules: Rules, fleet: FleetReader, folder: FolderWatch, operators: OperatorStore) -> None:
        self._rules = rules
        self._fleet = fleet
        self._folder = folder
        self._operators = operators

    async def load(self, reference: str) -> dict[str, Any]:
        """Accept requests for a model, and load it on the classes that can run it; returns what came of it on each.

        Raises:
            UnknownModelError: no such model in the models folder.
            ModelUnavailableError: its file is wrong, or no device has loaded it within `LOAD_WITHIN`.
            BrokerUnavailableError: the state store does not answer.
        """
        await self._folder.look(closely=True)
        catalogue = self._rules.catalogue
        model = catalogue.resolve(reference)
        wrong = catalogue.outdated.get(model.id) or catalogue.outdated.get(reference)
        if wrong is not None:
            message = (
                f"model {quoted(reference)} is served in its last valid version, because its file is wrong: {wrong}"
            )
            raise ModelUnavailableError(message, model=model.id, reason=wrong)
        again = {one.id for one in catalogue.named_by(reference)} & self._rules.unloaded
        await self._control({**dict.fromkeys(again), model.id: uuid.uuid4().hex})
        logger.info("model loaded by an operator", extra={"model": model.id})
        classes = await self._loaded(model)
        outcomes = {name: one.text for name, one in classes.items()}
        if not any(one.loaded for one in classes.values()):
            reason = (
                "; ".join(f"{name}: {text}" for name, text in outcomes.items()) or "no class of this fleet can run it"
            )
            raise ModelUnavailableError(f"model {model.id!r} is not loaded: {reason}", model=model.id, reason=reason)
        return {"name": model.name, "version": str(model.version), "classes": outcomes}

    async def unload(self, reference: str) -> dict[str, Any]:
        """Accept no more requests for a model or, if the reference names one, for that version; jobs end as they would.

        Returns its versions, and the processes that have not answered and may still accept some.

        Raises:
            UnknownModelError: no such model.
            ModelUnavailableError: its file is wrong, and it takes no requests.
            InvalidRequestError: it is a second name of a model.
            BrokerUnavailableError: the state store does not answer.
        """
        catalogue = self._rules.catalogue
        model = catalogue.resolve(reference)
        if catalogue.bare(reference) != model.name:
            message = (
                f"model: expected a model's own name, got an alias of {model.id!r}: unload that, or remove the alias"
            )
            raise InvalidRequestError(message, field="model")
        versions = sorted(one.id for one in catalogue.named_by(reference))
        silent = await self._control(dict.fromkeys(versions, ""))
        logger.info("model unloaded by an operator", extra={"model": reference, "versions": versions})
        return {"name": model.name, "versions": [one.partition(":")[2] for one in versions], "unanswered": silent}

    async def reload(self) -> dict[str, Any]:
        """Have every process reload now; returns what each of them serves then, and what changed there.

        Raises:
            BrokerUnavailableError: the state store does not answer.
        """
        before = await self._operators.catalogues()
        wanted = await self._operators.control_models({})
        after = await self._all_looked(wanted)
        processes = [_shown(name, before.get(name), report, wanted) for name, report in sorted(after.items())]
        return {"processes": processes}

    async def _control(self, marks: Mapping[str, str | None]) -> list[str]:
        """Record a request, and wait until all processes know of it; returns those that did not answer."""
        number = await self._operators.control_models(marks)
        reports = await self._all_looked(number)
        return sorted(name for name, report in reports.items() if report.reload < number)

    async def _all_looked(self, wanted: int) -> dict[str, CatalogueReport]:
        """The reports of all processes once each has done the reload of that number, or after `ANSWER_WITHIN`.

        Raises:
            BrokerUnavailableError: the state store does not answer.
        """
        self._folder.hurry()
        reports: dict[str, CatalogueReport] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_WITHIN):
                while not reports or any(report.reload < wanted for report in reports.values()):
                    await asyncio.sleep(_POLL if reports else 0)
                    reports = await self._operators.catalogues()
        return reports

    async def _loaded(self, model: Model) -> dict[str, LoadProgress]:
        """The result of a load by class, once no device may still load it, or the caller's time is over."""
        since = self._operators.clock.now()
        ends = time.monotonic() + min(LOAD_WITHIN, self._rules.topology.limits.wait)
        while True:
            reporting = {worker for worker, at in self._fleet.heartbeats.items() if at >= since}
            found = progress(model, self._rules.topology, self._fleet.snapshot, reporting)
            if time.monotonic() >= ends or not any(one.pending and not one.loaded for one in found.values()):
                return found
            await asyncio.sleep(_POLL)


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

"""How all processes of a fleet hear that they shall look at their models folder now, and tell what they have.

Each process calls `broker.valkey.records.watch_call` once a second: it tells the store what it serves, where that
changed, and hears how often an operator asked for a look (`RELOADS`). What it told is forgotten a minute after its last
call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from tasks.models.folder import ModelsFolder

LIVE = 5
"""Seconds since its last call within which a process counts as running."""


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a process serves from its models folder.

    `reload` is the last asked-for look that it has done; `models` maps `name:version` to a digest of its description.
    `queues_changed` says that its queues.yaml is another than the one that it started with: it goes by the old one.
    """

    kind: Literal["router", "worker"]
    reload: int
    models: Mapping[str, str]
    disabled: Mapping[str, str] = {}
    outdated: Mapping[str, str] = {}
    queues_changed: bool = False


class Reporter:
    """Makes one process's arguments for that call, and follows what it answers. For one thread at a time."""

    def __init__(self, folder: ModelsFolder, kind: Literal["router", "worker"], process: str) -> None:
        self._folder = folder
        self._kind = kind
        self._process = process
        self._asked: int | None = None
        self._done = 0
        self._told = b""
        self._sent = b""

    @property
    def asked(self) -> bool:
        """Whether somebody asked for a look that this process has not done."""
        return self._asked is not None and self._asked > self._done

    def looked(self) -> None:
        """It has done what was asked for so far."""
        self._done = self._asked or 0

    def arguments(self) -> Sequence[str | bytes]:
        """The process's name and its report; an empty one where the store has it already."""
        folder = self._folder
        self._sent = msgspec.json.encode(
            Report(
                kind=self._kind,
                reload=self._done,
                models=folder.digests,
                disabled=folder.catalogue.disabled,
                outdated=folder.catalogue.outdated,
                queues_changed=folder.queues_changed,
            )
        )
        return self._process, b"" if self._sent == self._told else self._sent

    def heard(self, answer: Sequence[int]) -> None:
        """Take in what was answered."""
        asked, known = int(answer[0]), bool(answer[1])
        if self._asked is None or asked < self._asked:  # what was asked for before it began is done; or a new store
            self._done = asked
        self._asked = asked
        self._told = self._sent if known else b""

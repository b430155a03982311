"""Receipts: which labels a request had, by which rule, which classes may not have it, and which one got it.

Each router's receipts are a chain: a receipt has its number and the digest of the one before it, and is signed with the
site's key, so that an exported file shows what was altered or left out. No I/O. A receipt has nothing of a request's
inputs or parameters.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Literal, NamedTuple

import msgspec

from tasks.models.model import Model
from tasks.queues.locality import joined, labels_of, missing
from tasks.topology import Topology
from taxiway.contract.request import Request
from taxiway.contract.sealed import sealed_in

EARLIER = "earlier"
"""The rule of a label of a moved job: the job's first receipt names it."""

Sign = Callable[[bytes], bytes]
Verify = Callable[[bytes, bytes], bool]
"""Whether a signature, the first argument, is that of these bytes."""


class PlacementReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """One decision about labelled work; a copy of a message, and a move that a worker forestalled, have one too."""

    job: str
    event: Literal["placed", "moved", "refused"]
    at: float
    """Unix time of the decision, by the store's clock."""
    labels: Mapping[str, tuple[str, ...]]
    """Each label, and the rules that gave it: request, tenant, model, classifier, sealed, fleet, or `EARLIER`."""
    lacking: Mapping[str, tuple[str, ...]]
    """Each class that may not have the job, and the labels that it lacks."""
    hardware_class: str = ""
    """The class that was chosen; empty if the request was refused."""
    source: str = ""
    """The class that a moved job leaves."""
    move: int = 0
    """Which of the job's moves it is, from 1."""
    error: str = ""
    """The code of the error with which the request was refused."""
    model: str = ""
    tenant: str = ""
    """Empty for a move."""
    site: str = ""
    router: str = ""
    number: int = 0
    """From 1, in the chain of its router."""
    previous: str = ""
    """SHA-256 of the receipt before it in the chain; empty for the first."""

    def refused(self, error: str) -> PlacementReceipt:
        """The receipt of a placement that the state store refused, with this error's code."""
        return msgspec.structs.replace(self, event="refused", hardware_class="", error=error)


class SealedReceipt(msgspec.Struct, frozen=True):
    """A line of the audit log: a receipt's bytes as they were signed, and their signature, empty without a key."""

    receipt: msgspec.Raw
    signature: str = ""


_encode = msgspec.json.Encoder(order="deterministic").encode
_read_line = msgspec.json.Decoder(SealedReceipt).decode
_read_receipt = msgspec.json.Decoder(PlacementReceipt).decode


def rules_by_label(
    request: Request, topology: Topology, model: Model, measured: str | None
) -> dict[str, tuple[str, ...]]:
    """Each label of a request, and the rules that gave it. `measured` is what its model and its content say."""
    content = [label for label in labels_of(measured) if label not in labels_of(model.locality)]
    sources = {
        "request": request.locality,
        "tenant": topology.rules_of(request.tenant).locality,
        "model": model.locality,
        "classifier" if sealed_in(request.inputs) is None else "sealed": joined(*content),
    }
    if joined(*sources.values()) is None:
        sources = {"fleet": topology.locality.default}
    labels = labels_of(joined(*sources.values()))
    return {label: tuple(rule for rule, one in sources.items() if label in labels_of(one)) for label in labels}


def lacking(labels: Iterable[str], topology: Topology) -> dict[str, tuple[str, ...]]:
    """The classes that lack some of these labels, with those."""
    locality = joined(*labels)
    absent = ((name, missing(locality, hardware.labels)) for name, hardware in sorted(topology.hardware.items()))
    return {name: tuple(lacks) for name, lacks in absent if lacks}


class Chain:
    """The receipts of one router, in order; without `sign` they have no signature."""

    def __init__(self, site: str = "", router: str = "", sign: Sign | None = None) -> None:
        self._site, self._router, self._sign = site, router, sign
        self._number, self._previous = 0, ""

    def seal(self, receipt: PlacementReceipt) -> bytes:
        """The line of the next receipt."""
        self._number += 1
        place = {"site": self._site, "router": self._router, "number": self._number, "previous": self._previous}
        signed = _encode(msgspec.structs.replace(receipt, **place))
        self._previous = digest_of(signed)
        return _line(signed, b"" if self._sign is None else self._sign(signed))


def _line(signed: bytes, signature: bytes) -> bytes:
    return _encode(SealedReceipt(msgspec.Raw(signed), base64.b64encode(signature).decode()))


def digest_of(signed: bytes) -> str:
    """SHA-256 of a receipt's bytes, in hexadecimal digits."""
    return hashlib.sha256(signed).hexdigest()


def read_line(line: bytes) -> tuple[PlacementReceipt, SealedReceipt]:
    """The receipt in a line. Raises `msgspec.MsgspecError` if it has none."""
    sealed = _read_line(line)
    return _read_receipt(sealed.receipt), sealed


class _Link(NamedTuple):
    """A receipt in the chain of its router."""

    number: int
    line: int
    previous: str
    digest: str


def flaws(lines: Iterable[bytes], verify: Verify) -> Iterator[str]:
    """What is wrong with an exported audit log; nothing if no line was altered, and none left out between two others.

    A chain may begin at any number, as the oldest receipts go first. A line that is there twice counts once.
    """
    chains: dict[str, dict[str, _Link]] = {}
    for at, line in enumerate(lines, 1):
        try:
            receipt, sealed = read_line(line)
            signature = base64.b64decode(sealed.signature, validate=True)
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError):
            yield f"line {at}: not a receipt"
            continue
        if _line(bytes(sealed.receipt), signature) != line:
            yield f"line {at}: job {receipt.job}: the line was altered"
        elif not signature:
            yield f"line {at}: job {receipt.job}: not signed"
        elif not verify(signature, bytes(sealed.receipt)):
            yield f"line {at}: job {receipt.job}: the signature is not that of the site's key, or the line was altered"
        else:
            link = _Link(receipt.number, at, receipt.previous, digest_of(bytes(sealed.receipt)))
            chains.setdefault(receipt.router, {}).setdefault(link.digest, link)
    for router, links in sorted(chains.items()):
        yield from _gaps(router, sorted(links.values()))


def _gaps(router: str, links: list[_Link]) -> Iterator[str]:
    """Receipts that are missing between those of a router, and those that do not follow the one before."""
    for before, link in pairwise(links):
        if link.number > before.number + 1:
            yield f"line {link.line}: receipts {before.number + 1} to {link.number - 1} of router {router} are missing"
        elif link.previous != before.digest:
            yield f"line {link.line}: receipt {link.number} of router {router} does not follow line {before.line}"

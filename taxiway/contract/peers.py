"""What two fleets say to each other: frames over one WebSocket, which either site opens.

A message is a list of frames in MessagePack, either way. The caller, which hands out work, speaks first, and both begin
with `PeerHello`. The
caller sends jobs and takes them back; the other site, for which the caller is a tenant, answers them, and says each
second what it would promise now. Times are seconds that are left, never moments: the sites' clocks differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from taxiway.contract.deltas import Delta
from taxiway.contract.job import Tokens
from taxiway.contract.request import Priority

VERSION = 1
"""Of the frames below. A site refuses every other one by name."""

PATH = "/v2/peers"

LINE = "taxiway-line"
"""The header of a worker that takes a connection which waits for work (`WaitingLine`): its token."""

MOST_JOBS = 4096
"""Jobs of one connection that a site answers at the same time; it refuses more, to be sent again later."""

MOST_OFFERS = 1024
"""Models that a site makes offers for on one connection."""

BESIDE = 2**16
"""Bytes of a message besides the request or the answer in it."""

OFFER_EVERY = 1.0
"""Seconds between two lists of offers, at least."""

STALE = 5.0
"""Seconds without a list of offers after which there are none: a site without changes repeats its last one sooner."""

WRONG_VERSION, WRONG_FRAME = 4001, 4002
"""Codes with which a connection is closed (RFC 6455, 7.4.2)."""

Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Dollars = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class SiteOffer(msgspec.Struct, frozen=True, array_like=True):
    """What a site would promise now to one more job of a model and a service, by the size of a row.

    A job of `read` units that its model reads and `written` ones that it generates is expected within `base +
    each_read·read + each_written·written` seconds at that site, and surely within `bound` times as many.
    """

    base: Seconds
    each_read: Seconds
    each_written: Seconds
    bound: Annotated[float, msgspec.Meta(ge=1, le=1e6)]
    # US dollars: for a row, and for each unit that is read and written
    usd: Dollars
    usd_read: Dollars
    usd_written: Dollars
    rate: Annotated[float, msgspec.Meta(gt=0, le=1e9)]
    """How much it takes: rows of the model's usual size that it serves in a second, behind each other."""

    def price(self, read: float, written: float) -> float:
        """US dollars for a row."""
        return self.usd + self.usd_read * read + self.usd_written * written

    def seconds(self, read: float, written: float) -> float:
        """Seconds within which a row is expected."""
        return self.base + self.each_read * read + self.each_written * written


Offers = Mapping[str, Mapping[str, SiteOffer]]
"""By model, and then by service; the service without a name is the site's default."""


class PeerHello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """Who speaks, and what it takes. What a later version adds comes last, and is skipped."""

    version: int
    site: str
    bytes: int
    """Of the largest frame that it reads."""
    models: tuple[str, ...] = ()
    """Of the caller: the models that it wants offers for, as the other site names them."""
    services: tuple[str, ...] = ()
    """And the services that it knows."""
    keys: tuple[str, ...] = ()
    """Of the other site: names of the keys of its sealed labels."""


class PeerServe(msgspec.Struct, frozen=True, array_like=True, tag="serve"):
    """In place of `PeerHello`, by a site that opened the connection to take work on it.

    It waits to be said hello to; from then on, it is the site that answers jobs.
    """

    version: int
    site: str


class WaitingLine(msgspec.Struct, frozen=True):
    """Where a connection waits that another fleet opened to take work on.

    It is the router that has it, and the secret with which a worker of this fleet takes it, once.
    """

    url: str
    token: str
    certificate: str = ""
    """SHA-256 of the router's certificate, in hexadecimal digits; empty without TLS."""


class PeerTerms(msgspec.Struct, frozen=True, array_like=True):
    """The service terms of a job that goes to another site, see `request.Terms`; `left` are seconds to its deadline."""

    left: float | None = None
    service: str | None = None
    priority: Priority | None = None
    budget: float | None = None
    stream: bool = False
    outputs: tuple[str, ...] = ()
    """Those to be returned; the usual ones, if none is named."""


class PeerSubmit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """A row of a job. A key that was seen before names the same job, and its answer is sent again."""

    key: str
    """The job, its attempt and the row, within the caller's tenant."""
    model: str
    content: msgspec.Raw
    """`PeerContent`."""
    terms: PeerTerms = PeerTerms()
    trace: str = ""
    """The trace context (W3C `traceparent`); empty for none."""


class PeerContent(msgspec.Struct, frozen=True, array_like=True):
    """Inputs by name, a batch of one row, and parameters."""

    inputs: dict[str, Any]
    parameters: dict[str, Any] = {}


class PeerCancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """The job is wanted no more."""

    key: str


class PeerTaken(msgspec.Struct, frozen=True, array_like=True, tag="taken"):
    """The job is accepted, durably."""

    key: str


class PeerRefused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """The job was not accepted, and may be sent again after some seconds, or run elsewhere."""

    key: str
    reason: str
    retry_after: Seconds


class PeerPiece(msgspec.Struct, frozen=True, array_like=True, tag="piece"):
    """Part of a generated answer: text from its character `at` on, and deltas of which `sent` came before."""

    key: str
    at: int
    text: str = ""
    sent: int = 0
    beside: Sequence[Delta] = ()


class PeerAnswer(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    """The outputs of a row by name, each a batch of one."""

    key: str
    outputs: dict[str, Any]
    cost: Dollars
    tokens: Tokens | None = None


class PeerFailure(msgspec.Struct, frozen=True, array_like=True, tag="failure"):
    """The job failed there, with an error of `taxiway.errors`."""

    key: str
    code: str
    message: str
    details: dict[str, Any] = {}


class PeerOffers(msgspec.Struct, frozen=True, array_like=True, tag="offers"):
    """All that the site offers now; what is not in it is not offered."""

    offers: dict[str, dict[str, SiteOffer]]
    at: Annotated[float, msgspec.Meta(ge=0, le=1e11)] = 0.0
    """Unix time by the site's clock, for the record: they are stale by the time since they came."""
    signature: bytes = b""
    """Ed25519, by the site's key, of `signed_part`; empty without a key."""

    def signed_part(self, caller: str) -> bytes:
        """What is signed of offers to the site with this name."""
        return encode_frames((caller, self.at, self.offers))


class PeerPart(msgspec.Struct, frozen=True, array_like=True, tag="part"):
    """Part of a frame that is longer than a message (`peer_messages`)."""

    content: memoryview
    last: bool = False


class PeerPing(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    """To be answered at once, with the same number."""

    number: int


class PeerPong(msgspec.Struct, frozen=True, array_like=True, tag="pong"):
    """The answer to a ping."""

    number: int


ToSite = PeerHello | PeerServe | PeerSubmit | PeerCancel | PeerPing
"""What the caller sends."""

ToCaller = PeerHello | PeerTaken | PeerRefused | PeerPiece | PeerAnswer | PeerFailure | PeerOffers | PeerPong
"""What the other site sends."""

read_line = msgspec.json.Decoder(WaitingLine).decode

encode_frames = msgspec.msgpack.Encoder().encode
"""A frame, or what a part of one holds, in MessagePack."""

read_to_site = msgspec.msgpack.Decoder(list[ToSite | PeerPart]).decode
read_to_caller = msgspec.msgpack.Decoder(list[ToCaller | PeerPart]).decode
"""The frames in a message."""

read_one_to_site = msgspec.msgpack.Decoder(ToSite).decode
read_one_to_caller = msgspec.msgpack.Decoder(ToCaller).decode
"""A frame that came in parts."""

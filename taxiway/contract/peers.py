"""What two fleets say to each other: frames over one WebSocket, which either site opens.

A message is a list of frames in MessagePack, either way. The caller, which hands out work, speaks first, and both begin
with `PeerHello`. The caller sends jobs and takes them back; the other site, for which the caller is a tenant, answers
them, and says each second what it would promise now. Times are seconds that are left, never moments: the sites' clocks
differ.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from taxiway.contract.job import Tokens
from taxiway.contract.request import Priority
from taxiway.contract.stream import Delta

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
    """The job was not accepted, and may be sent again after some seconds, or run elsewhere.

    `alone` says that no hardware there has it in time: others may be accepted meanwhile.
    """

    key: str
    reason: str
    retry_after: Seconds
    alone: bool = False


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
    """Part of a frame that is longer than a message (`MESSAGE`)."""

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


MESSAGE = 2**16
"""Bytes of the longest message: a line of 1 MB/s carries it in 66 ms.

A frame that takes a line seconds would keep every other one waiting for as long. So what is longer goes in parts, one
after the other; between two parts go the frames that came meanwhile. Frames of one job keep their order.
"""

MOST_READ = 2 * MESSAGE
"""Bytes of the longest message that is read."""

_HEADS = 2**6  # bytes of a message that are not in its frames: of the list, and of a part
_MOST_FRAMES = 2**16 - 1  # of a message

Frame = TypeVar("Frame")


class Outbox:
    """Frames to be sent on one connection. `small` and `large` are the bytes that wait, of short and of long frames."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._parted: deque[tuple[str, int, bytes]] = deque()
        self._keys: Counter[str] = Counter()
        self._at = 0  # bytes of the first in `_parted` that were sent
        self._put = self._sent = 0  # short frames
        self.small = self.large = 0

    def put(self, frame: bytes, key: str = "") -> None:
        """Add an encoded frame of a job; it comes behind those of the same job."""
        if len(frame) > MESSAGE // 2 or self._keys[key]:
            self._parted.append((key, self._put, frame))
            self._keys[key] += 1
            self.large += len(frame)
        else:
            self._frames.append(frame)
            self._put += 1
            self.small += len(frame)

    def messages(self) -> Iterator[bytes]:
        """Each message that is to be sent next, until nothing is left; frames may be added meanwhile."""
        while self._frames or self._parted:
            frames = [*self._small(), *self._part()]
            yield b"".join((b"\xdc", len(frames).to_bytes(2, "big"), *frames))  # a list, as MessagePack has it

    def _small(self) -> Iterator[bytes]:
        """Frames for half a message, so that the other half is left to a part."""
        size = count = 0
        while self._frames and size + len(self._frames[0]) <= MESSAGE // 2 and count < _MOST_FRAMES - 1:
            frame = self._frames.popleft()
            size, count = size + len(frame), count + 1
            self._sent += 1
            self.small -= len(frame)
            yield frame

    def _part(self) -> Iterator[bytes]:
        """A part of the first long frame, once the short ones before it were sent: one may be of its job."""
        if not self._parted or self._sent < self._parted[0][1]:
            return
        key, _, frame = self._parted[0]
        content = memoryview(frame)[self._at : self._at + MESSAGE // 2 - _HEADS]
        self._at += len(content)
        self.large -= len(content)
        last = self._at == len(frame)
        if last:
            self._parted.popleft()
            self._keys -= Counter([key])
            self._at = 0
        yield encode_frames(PeerPart(content, last))


class Inbox(Generic[Frame]):
    """Frames in the messages of one connection.

    Args:
        read: the frames in a message.
        read_one: a frame, of one that came in parts.
        most: bytes of the longest frame.
    """

    def __init__(
        self, read: Callable[[bytes], list[Frame | PeerPart]], read_one: Callable[[bytearray], Frame], most: int
    ) -> None:
        self._read, self._read_one, self._most = read, read_one, most
        self._parts = bytearray()

    def frames(self, message: bytes) -> Iterator[Frame]:
        """The frames that a message completes. Raises one of `UNREADABLE`."""
        for frame in self._read(message):
            if not isinstance(frame, PeerPart):
                yield frame
                continue
            self._parts += frame.content
            if len(self._parts) > self._most:
                raise msgspec.ValidationError(f"a frame of more than {self._most} bytes")
            if frame.last:
                whole, self._parts = self._parts, bytearray()
                yield self._read_one(whole)

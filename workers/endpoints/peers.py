"""The connection to another fleet: one WebSocket that many jobs share, opened here and kept open.

When the line is cut, what was sent and not answered is sent again under the same keys once it is back, so that each job
goes on where it runs. After a lease it is given up: it runs elsewhere as another attempt, and what becomes of this one
is cancelled, or dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import aiohttp
import msgspec

from tasks.heartbeat import PeerFacts, three_digits
from tasks.queues.endpoints import Endpoint
from tasks.queues.receipts import Verify
from taxiway.contract.job import Tokens
from taxiway.contract.peers import (
    BESIDE,
    LINE,
    MOST_READ,
    PATH,
    STALE,
    VERSION,
    Offers,
    PeerAnswer,
    PeerCancel,
    PeerContent,
    PeerFailure,
    PeerHello,
    PeerOffers,
    PeerPiece,
    PeerPing,
    PeerPong,
    PeerRefused,
    PeerSubmit,
    PeerTaken,
    PeerTerms,
    SiteOffer,
    ToCaller,
    WaitingLine,
    encode_frames,
)
from taxiway.contract.request import Priority
from taxiway.contract.sealed import row_of, sealed_in
from taxiway.errors import (
    UNREADABLE,
    BrokerUnavailableError,
    DeadlineExceededError,
    InvalidRequestError,
    RequestTooLargeError,
    SealedError,
    TaxiwayError,
    cut,
    error_of_code,
)
from workers.endpoints.http import EndpointLink
from workers.endpoints.protocol import (
    BUSY_FOR,
    LONGEST_WAIT,
    MAX_ANSWER,
    Behalf,
    EndpointError,
    Exchange,
    FaultKind,
    Tell,
)
from workers.endpoints.site_line import BrokenProtocolError, SiteLine
from workers.endpoints.taxiway import PeerReader
from workers.port import Row

if TYPE_CHECKING:
    from taxiway.sealing import SealKeys

logger = logging.getLogger(__name__)

MOST_GIVEN_UP = 10_000
"""Jobs given up without a line that are cancelled once it is back."""

MEASURED = 2**18
"""Bytes of a request from which on it tells how fast the line is."""

_KEPT = 0.8  # share of earlier measurements that each further one leaves
_FASTEST = 1e12  # bytes a second; more is not believed
_REPORTED = 64  # characters of a site's name
_numbers = itertools.count()  # of pings


@dataclass(frozen=True, slots=True)
class Origin:
    """The fleet of this worker: what it is called, its services, and the seconds after which lost work runs again.

    `line` finds a connection that a peer opened; it may block, and raises `BrokerUnavailableError`.
    """

    site: str
    services: tuple[str, ...]
    lease: float
    line: Callable[[str], WaitingLine | None]
    seal_keys: SealKeys | None = None


class _Asked(msgspec.Struct, frozen=True):
    """What is said to another fleet of a job's terms; where its data may go is kept here, by the class's labels."""

    service: str | None = None
    priority: Priority | None = None
    budget: float | None = None
    outputs: tuple[str, ...] = ()


_read_asked = msgspec.json.Decoder(tuple[tuple[()], _Asked, msgspec.Raw]).decode


@dataclass(slots=True, eq=False)
class _Call:
    """A row that was sent, and is not answered."""

    behalf: Behalf
    exchange: Exchange
    reader: PeerReader
    offer: SiteOffer
    tell: Tell
    terms: PeerTerms
    content: bytes
    """`PeerContent`."""
    said: float = 0.0
    """When it was sent on the present connection, on the monotonic clock."""
    carried: int = 0
    """Bytes of large frames that the line had to carry from then on, until it was there; 0 once it is."""
    answer: asyncio.Future[Row] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def fail(self, error: Exception) -> None:
        """End it with an error, unless it has ended."""
        if not self.answer.done():
            self.answer.set_exception(error)

    def frame(self, now: float) -> PeerSubmit:
        """What is sent for it now, with rounded seconds: jobs of the same terms share a placement."""
        spent = now - self.exchange.sent
        left = None if self.terms.left is None else three_digits(max(self.terms.left - spent, 1e-3))
        terms = msgspec.structs.replace(self.terms, left=left)
        behalf = self.behalf
        return PeerSubmit(behalf.key, self.exchange.ask.path, msgspec.Raw(self.content), terms, behalf.trace)

    def bill(self, answer: PeerAnswer, travel: float) -> None:
        """Note what it costs, and was expected to take with the line's `travel`; no more is billed than was offered."""
        exchange, offer, said = self.exchange, self.offer, answer.tokens
        written = 0 if said is None else min(max(said.output, 0), exchange.size)
        read = exchange.size if said is None else exchange.prompt
        exchange.expected = offer.seconds(read, written) + travel
        most = offer.bound * offer.price(read, written)
        exchange.cost = min(answer.cost, most)
        if answer.cost > most:
            extra = {"key": self.behalf.key, "billed": answer.cost, "offered": most}
            logger.warning("site bills more than it offered; not believed", extra=extra)


@dataclass(slots=True)
class _Site:
    """What is known of the other fleet. Any thread may read `facts`."""

    name: str = ""
    offers: Offers = field(default_factory=dict)
    offered: float = -math.inf
    """When the offers came, on the monotonic clock."""
    signed_at: float = 0.0
    round_trip: float = 0.0
    keys: tuple[str, ...] = ()
    moved: float = 0.0
    moving: float = 0.0
    """Bytes of large requests, and seconds that they took: the latest ones count most."""
    dropped: int = 0
    why: str = ""
    """Why there is no line; empty if there is one, or none was tried."""

    def fresh(self, now: float) -> Offers:
        """The offers, unless they are stale."""
        return self.offers if now - self.offered < STALE else {}

    @property
    def bytes_per_second(self) -> float:
        """What the line carries of large requests; 0 before the first."""
        return self.moved / self.moving if self.moving else 0.0

    def travel(self, size: int) -> float:
        """Seconds of the line for a request."""
        return self.round_trip + (size * self.moving / self.moved if self.moved else 0.0)

    def measure(self, size: int, seconds: float) -> None:
        """Learn from a request that was taken so long after it was sent, behind others: `size` are all their bytes."""
        alone = max(seconds - self.round_trip, size / _FASTEST)
        self.moved, self.moving = _KEPT * self.moved + size, _KEPT * self.moving + alone

    def facts(self, now: float) -> PeerFacts:
        """What heartbeats report."""
        offers = {model: dict(made) for model, made in self.fresh(now).items()}
        age = now - self.offered if offers else 0.0
        return PeerFacts(
            site=self.name,
            round_trip=self.round_trip,
            age=age,
            offers=offers,
            keys=self.keys,
            dropped=self.dropped,
            bytes_per_second=self.bytes_per_second,
            signed_at=self.signed_at if offers else 0.0,
        )


class PeerLink(EndpointLink):
    """The connection to another fleet, with the face of an endpoint's. For one event loop; `peer` for any thread."""

    def __init__(self, endpoint: Endpoint, replica: str, key: str, stall: float, origin: Origin) -> None:
        super().__init__(endpoint, replica, key, stall)
        self._origin, self._site = origin, _Site()
        self._peer = endpoint.peer
        self._verify: Verify | None = None
        if endpoint.public_key is not None:
            from tasks.site_key import verifier  # others start 60 ms sooner without cryptography

            self._verify = verifier(endpoint.public_key)
        self._models = tuple(sorted(set(endpoint.calls.values())))
        self._calls: dict[str, _Call] = {}
        self._given_up: deque[str] = deque(maxlen=MOST_GIVEN_UP)
        self._expiry: asyncio.TimerHandle | None = None
        self._pongs: dict[int, asyncio.Future[None]] = {}

    @property
    def peer(self) -> PeerFacts:
        """See `EndpointLink`."""
        return self._site.facts(time.monotonic())

    async def open(self) -> None:
        """Connect, and stay connected."""
        await super().open()
        self._ready = asyncio.Event()
        hello = PeerHello(VERSION, self._origin.site, MAX_ANSWER, self._models, self._origin.services)
        self._line = SiteLine(hello, greet=self._greet, take=self._take, lost=self._lost)
        self._staying = asyncio.create_task(self._line.stay(self._connect, self._fault))

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        """Connect to the other fleet, or take a connection that it opened.

        Raises:
            EndpointError: it opened none.
        """
        if self._peer is None:
            return await self._session.ws_connect(self.url + PATH, max_msg_size=MOST_READ, compress=0)
        try:
            line = await asyncio.to_thread(self._origin.line, self._peer)
        except BrokerUnavailableError as error:
            raise EndpointError(FaultKind.UNREACHED, error.message) from error
        if line is None:
            raise EndpointError(FaultKind.UNREACHED, f"no connection of the peer {self._peer!r} waits for work")
        certificate = aiohttp.Fingerprint(bytes.fromhex(line.certificate)) if line.certificate else True
        return await self._session.ws_connect(
            line.url + PATH, headers={LINE: line.token}, ssl=certificate, max_msg_size=MOST_READ, compress=0
        )

    async def close(self) -> None:
        """Leave; what was sent and not answered goes on there."""
        self._staying.cancel()
        await asyncio.gather(self._staying, return_exceptions=True)
        if self._expiry is not None:
            self._expiry.cancel()
        await super().close()

    async def probe(
        self, path: str, timeout: float, method: str = "GET", *, base: str = "", body: bytes = b"{}"
    ) -> bytes:
        """The models that are offered now, after a ping and its answer.

        Raises:
            EndpointError: there is no connection, or no answer.
        """
        if path or self._site.why:
            raise EndpointError(FaultKind.UNREACHED, self._site.why or f"another fleet has no {path}")
        number, pong = next(_numbers), asyncio.get_running_loop().create_future()
        self._pongs[number] = pong
        try:
            async with asyncio.timeout(timeout):
                await self._ready.wait()
                began = time.monotonic()
                self._line.say(PeerPing(number))
                await pong
        except TimeoutError as error:
            reason = self._site.why or f"{self._named} did not answer within {timeout:g} s"
            raise EndpointError(FaultKind.UNREACHED, reason) from error
        finally:
            del self._pongs[number]
        now = time.monotonic()
        self._site.round_trip = now - began
        return encode_frames(list(self._site.fresh(now)))

    async def ask(self, exchange: Exchange, tell: Tell) -> Row:
        """See `EndpointLink`; if this is cancelled, the job is cancelled there."""
        call = self._call(exchange, tell)
        exchange.sent, exchange.reader = time.monotonic(), call.reader
        self._calls[call.behalf.key] = call
        try:
            self._say(call)
            return await call.answer
        except EndpointError as error:
            exchange.refused = error.kind is not FaultKind.BROKEN
            raise
        except asyncio.CancelledError:
            self._give_up(call.behalf.key)
            raise
        finally:
            del self._calls[call.behalf.key]

    def _say(self, call: _Call) -> None:
        call.said = time.monotonic()
        self._line.say(call.frame(call.said))
        call.carried = self._line.waiting

    def _call(self, exchange: Exchange, tell: Tell) -> _Call:
        behalf, reader = exchange.behalf, exchange.ask.read({})
        assert behalf is not None and isinstance(reader, PeerReader)
        asked = _asked(behalf.body)
        made = self._site.fresh(time.monotonic()).get(exchange.ask.path, {})
        service = asked.service if asked.service in made else None
        offer = made.get(service or "")
        if offer is None or not self._ready.is_set():
            reason = self._site.why or f"{self._named} offers no {exchange.ask.path} now"
            raise EndpointError(FaultKind.UNREACHED if self._site.why else FaultKind.BUSY, reason, BUSY_FOR)
        content = self._content(behalf, exchange)
        if (size := len(content)) > (most := self._line.most - BESIDE):
            raise RequestTooLargeError(f"{self._named} takes requests of at most {most} bytes, got {size}")
        terms = PeerTerms(behalf.left, service, asked.priority, asked.budget, behalf.streams, asked.outputs)
        return _Call(behalf, exchange, reader, offer, tell, terms, content)

    def _content(self, behalf: Behalf, exchange: Exchange) -> bytes:
        """What is sent of a row: its content as it is, or sealed for the workers there if it came sealed."""
        sealed, seal_keys, ask = behalf.sealed, self._origin.seal_keys, exchange.ask
        if sealed is None or seal_keys is None:
            return ask.body
        facts = msgspec.structs.replace(
            sealed.facts, rows=1, size=exchange.prompt, longest=max(exchange.size - exchange.prompt, 0)
        )
        keys = [seal_keys.public(name) for name in sealed.keys]
        name = ask.path.partition(":")[0].partition("@")[0]  # of a reference such as `sentiment:2`, `sentiment@stable`
        again = seal_keys.seal_inputs(ask.body, keys, row_of(behalf.key), name, facts)
        return encode_frames(PeerContent(again.value))

    def _opened(self, answer: PeerAnswer, behalf: Behalf) -> PeerAnswer:
        """The answer with its outputs opened, if the row was sealed.

        Raises:
            EndpointError: they are not sealed, or were altered.
        """
        if behalf.sealed is None or self._origin.seal_keys is None:
            return answer
        try:
            if sealed_in(answer.outputs) is None:
                raise SealedError("expected sealed outputs, got plain ones")
            outputs = self._origin.seal_keys.open_outputs(answer.outputs, row_of(behalf.key))
        except TaxiwayError as error:
            self._site.dropped += 1
            raise EndpointError(FaultKind.BROKEN, f"{self._named}: {error.message}") from error
        return msgspec.structs.replace(answer, outputs=outputs)

    @property
    def _named(self) -> str:
        return f"site {self._site.name or self.url}"

    def _give_up(self, key: str) -> None:
        """Have a job cancelled there, once there is a line."""
        if self._ready.is_set():
            self._line.say(PeerCancel(key))
        else:
            self._given_up.append(key)

    def _greet(self, frame: ToCaller) -> None:
        """Take in who speaks there. What was sent before and is not answered is sent again."""
        if not isinstance(frame, PeerHello):
            raise BrokenProtocolError("expected hello first")
        if frame.version != VERSION:
            raise BrokenProtocolError(f"it speaks version {frame.version} of the protocol, this site {VERSION}")
        self._site.name, self._line.most = cut(frame.site, _REPORTED), frame.bytes
        own = () if self._origin.seal_keys is None else self._origin.seal_keys.names
        self._site.keys = tuple(name for name in own if name in frame.keys)
        for key in self._given_up:
            self._line.say(PeerCancel(key))
        self._given_up.clear()
        for call in self._calls.values():
            self._say(call)
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _take(self, frame: ToCaller) -> None:
        self.received = time.monotonic()
        match frame:
            case PeerOffers(offers=offers):
                self._site.signed_at = self._verified(frame)
                self._site.offers, self._site.offered, self._site.why = offers, time.monotonic(), ""
                self._ready.set()
            case PeerPong(number=number):
                if (pong := self._pongs.get(number)) is not None and not pong.done():
                    pong.set_result(None)
            case PeerTaken(key=key):
                if (call := self._calls.get(key)) is not None and call.carried and len(call.content) >= MEASURED:
                    self._site.measure(call.carried, time.monotonic() - call.said)
                    call.carried = 0
            case PeerPiece() | PeerAnswer() | PeerFailure() | PeerRefused():
                self._hear(frame)

    def _verified(self, offers: PeerOffers) -> float:
        """When the offers were signed; 0 where that need not be."""
        if self._verify is None:
            return 0.0
        if not self._verify(offers.signature, offers.signed_part(self._origin.site)):
            raise BrokenProtocolError("its offers are not signed with endpoint.public_key")
        return offers.at

    def _hear(self, frame: PeerPiece | PeerAnswer | PeerFailure | PeerRefused) -> None:
        """Take in what is said of a job. Of one that was given up, or never sent, it is dropped."""
        call = self._calls.get(frame.key)
        if call is None or call.answer.done():
            self._site.dropped += not isinstance(frame, PeerPiece)
            return
        try:
            match frame:
                case PeerPiece():
                    if parts := call.reader.take(frame):
                        call.exchange.first = call.exchange.first or time.monotonic()
                        call.tell(parts)
                case PeerAnswer():
                    call.reader.end(_believed(self._opened(frame, call.behalf), call.exchange))
                    call.bill(frame, self._site.travel(len(call.content)))
                    call.answer.set_result(call.reader.answer())
                case PeerFailure():
                    call.fail(self._meaning(frame, row_of(frame.key)))
                case PeerRefused():
                    kind, meaning = (FaultKind.REFUSED, "refuses it") if frame.alone else (FaultKind.BUSY, "is busy")
                    text = f"{self._named} {meaning}: {cut(frame.reason)}"
                    call.fail(EndpointError(kind, text, min(frame.retry_after, LONGEST_WAIT)))
        except EndpointError as error:
            call.fail(error)
            self._give_up(frame.key)

    def _meaning(self, failure: PeerFailure, row: str) -> EndpointError | TaxiwayError:
        """Whose fault a failure is: the request's where this fleet would have found the same, else that site's."""
        error = error_of_code(failure.code, failure.message, {"sealed": failure.details.get("sealed")})
        if self._origin.seal_keys is not None:
            with contextlib.suppress(TaxiwayError):  # it stays sealed
                error = self._origin.seal_keys.open_error(error, row)
        error = type(error)(f"at {self._named}: {cut(error.message)}")
        if isinstance(error, InvalidRequestError | RequestTooLargeError | DeadlineExceededError):
            return error
        return EndpointError(FaultKind.BROKEN, error.message)

    def _lost(self, why: str, broken: bool) -> None:
        """There is no line: nothing is offered, and after a lease what was sent is given up."""
        if self._ready.is_set():
            logger.warning("line to a site lost", extra={"site": self._site.name, "reason": why})
        self._site.why, self._site.offers = f"{self._named}: {why}", {}
        self._ready.clear()
        if broken:
            self._end_all(why)
        elif self._expiry is None:
            end = f"no line for {self._origin.lease:g} s"
            self._expiry = asyncio.get_running_loop().call_later(self._origin.lease, self._end_all, end)

    def _end_all(self, why: str) -> None:
        for key, call in list(self._calls.items()):
            self._give_up(key)
            call.fail(EndpointError(FaultKind.BROKEN, f"{self._named}: {why}"))


def open_link(endpoint: Endpoint, replica: str, key: str, stall: float, origin: Origin) -> EndpointLink:
    """The link to a replica of an endpoint, not yet open.

    Raises:
        EndpointConfigError: a certificate cannot be read.
    """
    if endpoint.is_peer:
        return PeerLink(endpoint, replica, key, stall, origin)
    return EndpointLink(endpoint, replica, key, stall)


def _asked(body: bytes) -> _Asked:
    """The terms in a job's request; none of a form that only Celery reads."""
    try:
        return _read_asked(body)[1]
    except UNREADABLE:
        return _Asked()


def _believed(answer: PeerAnswer, exchange: Exchange) -> PeerAnswer:
    """The answer, with no more tokens than its request may have."""
    said = answer.tokens
    if said is None:
        return answer
    read, written = (min(max(figure, 0), exchange.size) for figure in (said.input, said.output))
    tokens = Tokens(input=read, cached=min(max(said.cached, 0), read), output=written)
    return msgspec.structs.replace(answer, tokens=tokens)

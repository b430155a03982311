"""One peer's connection: runs the jobs that come on it beside each other, and tells the peer what it is offered."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from api.access import Bodies, TenantRates
from api.errors import unforeseen
from api.inference.infer import Accepted, Inference, continue_trace
from api.inference.streaming import Streaming
from api.jobs import Jobs
from api.peers.offers import changed, offers_of
from api.routing.router import HttpRouter
from router.service.admission import lacks_hardware
from tasks.queues.endpoints import HOME
from tasks.ticket import job_id
from taxiway.contract.job import Result
from taxiway.contract.peers import (
    BESIDE,
    MESSAGE,
    MOST_JOBS,
    MOST_OFFERS,
    OFFER_EVERY,
    PATH,
    STALE,
    VERSION,
    WRONG_FRAME,
    WRONG_VERSION,
    Inbox,
    Outbox,
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
    PeerServe,
    PeerSubmit,
    PeerTaken,
    SiteOffer,
    ToCaller,
    ToSite,
    encode_frames,
    read_one_to_site,
    read_to_site,
)
from taxiway.contract.request import Request, Terms, parse_request
from taxiway.contract.stream import Piece, StreamEntry
from taxiway.errors import (
    UNREADABLE,
    FleetUnavailable,
    RateLimitedError,
    RequestTooLargeError,
    TaxiwayError,
    cut,
    unreadable,
)
from taxiway.running import beside, end, first_of

HELLO_WITHIN = 10.0
"""Seconds within which a peer says who it is."""

MOST_UNREAD = 4 * 2**20
"""Bytes that wait for a peer to read them; then its jobs wait."""

ReceiveMessage = Callable[[], Awaitable[bytes | None]]
"""The next message; None once the peer has left."""

_RETRY_AFTER = 1.0  # seconds, for a refusal that does not say it

_read_content = msgspec.msgpack.Decoder(PeerContent).decode


@dataclass(frozen=True, slots=True)
class PeerDesk:
    """What all peers' connections share."""

    router: HttpRouter
    inference: Inference
    rates: TenantRates
    bodies: Bodies

    @property
    def most_bytes(self) -> int:
        """Bytes of the largest frame that is read."""
        return int(self.router.rules.topology.limits.payload) + BESIDE

    @property
    def home(self) -> str | None:
        """The locality of peers' work where this fleet has peers itself: it is not handed on, nor back."""
        hardware = self.router.rules.topology.hardware.values()
        return HOME if any(one.is_peer for one in hardware) else None


class PeerError(Exception):
    """The connection cannot go on: the code and the reason with which it is closed."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class PeerConnection:
    """One connection of a tenant; None is the default one, at an API without keys.

    Args:
        send: sends one message.
        valid: whether the tenant's key still is.
    """

    def __init__(
        self, desk: PeerDesk, tenant: str | None, send: Callable[[bytes], Awaitable[None]], valid: Callable[[], bool]
    ) -> None:
        self._desk, self._send, self._valid = desk, send, valid
        self._tenant, self._limited = tenant or Terms().tenant, tenant is not None
        self._home = desk.home
        self._most = 0
        self._in, self._out = Inbox(read_to_site, read_one_to_site, desk.most_bytes), Outbox()
        self._news, self._free, self._free_large = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._let_on()
        self._jobs: dict[str, _PeerJob] = {}
        self._cancels: set[asyncio.Task[None]] = set()
        self._early: list[ToSite] = []  # what came with the peer's first frame

    async def first(self, receive: ReceiveMessage, within: float | None = HELLO_WITHIN) -> ToSite | None:
        """What the peer says first; None if it leaves.

        Raises:
            PeerError: it cannot be read, did not come within so many seconds, or was said unasked.
        """
        frames: list[ToSite] = []
        try:
            async with asyncio.timeout(within):
                while not frames and (message := await receive()) is not None:
                    frames = list(self._frames(message))
        except TimeoutError as error:
            raise PeerError(WRONG_FRAME, f"no hello within {within:g} s") from error
        if len(frames) > 1 and isinstance(frames[0], PeerServe):
            raise PeerError(WRONG_FRAME, "expected nothing before hello")
        self._early = frames[1:]
        return frames[0] if frames else None

    async def serve(self, first: ToSite | None, receive: ReceiveMessage) -> None:
        """Serve until the peer leaves. Its jobs go on: it comes back for their answers, or cancels them.

        Raises:
            PeerError: what it sends cannot be read, or its key has ended.
        """
        if first is None:
            return
        hello = self._greet(first)
        try:
            for frame in self._early:
                self._take(frame)
            await first_of(self._read(receive), self._write(), self._offer(hello))
        finally:
            await end([job.task for job in self._jobs.values()])
            await asyncio.gather(*self._cancels, return_exceptions=True)

    def _greet(self, hello: ToSite) -> PeerHello:
        if not isinstance(hello, PeerHello):
            raise PeerError(WRONG_FRAME, "expected hello first")
        if hello.version != VERSION:
            raise PeerError(WRONG_VERSION, f"expected version {VERSION} of the protocol, got {hello.version}")
        self._most = hello.bytes
        topology = self._desk.router.rules.topology
        self._tell(PeerHello(VERSION, topology.site, self._desk.most_bytes, keys=topology.locality.key_names))
        return hello

    async def _read(self, receive: ReceiveMessage) -> None:
        while (message := await receive()) is not None:
            for frame in self._frames(message):
                self._take(frame)
            await self._free.wait()

    def _take(self, frame: ToSite) -> None:
        match frame:
            case PeerSubmit(key=key) if key in self._jobs:
                pass  # it will be answered
            case PeerSubmit(key=key) if len(self._jobs) >= MOST_JOBS:
                refusal = f"the connection has {MOST_JOBS} jobs that are not answered"
                self._tell(PeerRefused(key, refusal, _RETRY_AFTER))
            case PeerSubmit(key=key):
                job = self._jobs[key] = _PeerJob()
                job.task = asyncio.create_task(self._answer(job, frame))
            case PeerCancel(key=key):
                task = asyncio.create_task(self._cancel(key))
                self._cancels.add(task)
                task.add_done_callback(self._cancels.discard)
            case PeerPing(number=number):
                self._tell(PeerPong(number))
            case PeerHello() | PeerServe():
                raise PeerError(WRONG_FRAME, "expected hello once")

    async def _answer(self, job: _PeerJob, submit: PeerSubmit) -> None:
        """Accept a job, and send its answer once it has one."""
        key, streams = submit.key, submit.terms.stream
        try:
            accepted = await self._accepted(submit)
            del submit  # its body is not kept while it runs
            job.accepted.set()
            self._tell(PeerTaken(key))
            last = await self._ending(key, accepted, streams=streams)
        except FleetUnavailable as error:
            after = error.details.get("retry_after") or _RETRY_AFTER
            last = PeerRefused(key, cut(error.message), float(after), lacks_hardware(error))
        except TaxiwayError as error:
            last = _failure(key, error)
        except Exception as error:  # unexpected: logged by `unforeseen`
            last = _failure(key, unforeseen("GET", PATH, error))
        finally:
            job.accepted.set()
            self._jobs.pop(key, None)
        if last is not None:
            encoded = self._encoded(last)
            await (self._free_large if len(encoded) > MESSAGE // 2 else self._free).wait()
            self._put(encoded, key)

    async def _accepted(self, submit: PeerSubmit) -> Accepted:
        """Accept a job as an infer request of the tenant. Raises what `Inference.accept` raises."""
        size, tenant, desk = len(memoryview(submit.content)), self._tenant, self._desk
        if self._limited and (wait := desk.rates.wait(tenant, time.monotonic())) > 0:
            raise RateLimitedError(f"rate limit exceeded by tenant {tenant!r}", tenant=tenant, retry_after=wait)
        desk.bodies.take(tenant, size)
        try:
            request = await beside(size, _request, submit, self._tenant, self._home)
            continue_trace(submit.trace)
            return await desk.inference.accept(request, size, awaited=True)
        finally:
            desk.bodies.give_back(tenant, size)

    async def _ending(self, key: str, accepted: Accepted, *, streams: bool) -> ToCaller | None:
        """How an accepted job ended; None if the router stops first. What it generates is sent as it comes."""
        try:
            result = await (self._streamed(key, accepted.job) if streams else self._waited(accepted))
        except TaxiwayError as error:
            return _failure(key, error)
        return None if result is None else PeerAnswer(key, result.outputs, result.report.cost, result.report.tokens)

    async def _waited(self, accepted: Accepted) -> Result | None:
        meta = await self._desk.inference.ended(accepted)
        return None if meta is None else await self._desk.inference.stored(meta)

    async def _streamed(self, key: str, job: str) -> Result | None:
        router, inference = self._desk.router, self._desk.inference
        streaming = Streaming(Jobs(router, self._tenant), inference)
        async with contextlib.aclosing(streaming.followed(job, _Pieces(key))) as parts:
            async for part in parts:
                if isinstance(part, Result):
                    return part
                await self._free.wait()
                self._tell(part)
        return None

    async def _cancel(self, key: str) -> None:
        """End a job, also one that came on an earlier connection."""
        job, router = self._jobs.get(key), self._desk.router
        if job is not None:
            await job.accepted.wait()
            job.task.cancel()
        named = job_id(Terms(tenant=self._tenant, idempotency_key=key), router.rules.secret[0])
        with contextlib.suppress(TaxiwayError):  # it has ended, or never began
            await Jobs(router, self._tenant).cancel(named)

    async def _offer(self, hello: PeerHello) -> None:
        """Send offers once they change, and often enough that the peer does not take them for stale."""
        sent: dict[str, dict[str, SiteOffer]] = {}
        at = -math.inf
        while True:
            if not self._valid():
                raise PeerError(WRONG_FRAME, "the key has ended")
            offers = await self._offers(hello)
            if changed(sent, offers) or time.monotonic() - at > STALE / 3:
                sent, at = offers, time.monotonic()
                self._tell(self._signed(PeerOffers(sent, time.time()), hello.site))
            await asyncio.sleep(OFFER_EVERY)

    def _signed(self, offers: PeerOffers, caller: str) -> PeerOffers:
        sign = self._desk.router.rules.sign
        return msgspec.structs.replace(offers, signature=sign(offers.signed_part(caller))) if sign else offers

    async def _offers(self, hello: PeerHello) -> dict[str, dict[str, SiteOffer]]:
        rules, fleet = self._desk.router.rules, self._desk.router.fleet
        terms, found = Terms(tenant=self._tenant, locality=self._home), {}
        for name in hello.models[:MOST_OFFERS]:
            now = fleet.working.fleet
            if not now.stale and not now.draining and rules.catalogue.serves(name):
                model = rules.catalogue.resolve(name)
                found[name] = offers_of(model, terms, hello.services, rules.topology, fleet.working)
                await asyncio.sleep(0)  # requests are placed meanwhile
        return {name: offers for name, offers in found.items() if offers}

    def _tell(self, frame: ToCaller) -> None:
        self._put(encode_frames(frame), getattr(frame, "key", ""))

    def _encoded(self, frame: ToCaller) -> bytes:
        """A job's last frame, or what is said in its place of an answer that is too long."""
        encoded = encode_frames(frame)
        if len(encoded) > self._most and isinstance(frame, PeerAnswer):
            text = f"the answer has {len(encoded)} bytes, more than the site that asked reads ({self._most})"
            encoded = encode_frames(_failure(frame.key, RequestTooLargeError(text)))
        return encoded

    def _put(self, encoded: bytes, key: str) -> None:
        self._out.put(encoded, key)
        self._let_on()
        self._news.set()

    def _let_on(self) -> None:
        """Have jobs wait while too much waits for the peer to read it: a large answer keeps only large ones waiting."""
        for event, waiting in ((self._free, self._out.small), (self._free_large, self._out.large)):
            if waiting > MOST_UNREAD:
                event.clear()
            else:
                event.set()

    async def _write(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            for message in self._out.messages():
                await self._send(message)
                self._let_on()

    def _frames(self, message: bytes) -> Iterator[ToSite]:
        try:
            yield from self._in.frames(message)
        except UNREADABLE as error:
            raise PeerError(WRONG_FRAME, f"malformed: {cut(str(error), 80)}") from error


@dataclass(slots=True)
class _PeerJob:
    """A job that is not answered; `accepted` is set once that is decided."""

    accepted: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] = field(init=False)


class _Pieces:
    """What a peer receives of a job's stream: the pieces of its first row, each with its place in the answer."""

    def __init__(self, key: str) -> None:
        self._key = key
        self.entry = "0-0"

    def take_all(self, entries: Iterable[tuple[str, StreamEntry]]) -> Iterator[PeerPiece]:
        """See `stream.Following`."""
        for self.entry, piece in entries:
            if isinstance(piece, Piece) and not piece.row:
                yield PeerPiece(self._key, piece.at, piece.text, piece.sent, piece.beside)

    def end(self, result: Result) -> Iterable[PeerPiece]:
        """Nothing: the answer follows, and has it all."""
        return ()


def _request(submit: PeerSubmit, tenant: str, locality: str | None) -> Request:
    """The request in a frame. Raises `RequestError`."""
    try:
        content = _read_content(submit.content)
    except UNREADABLE as error:
        raise unreadable(error, "content") from error
    terms = submit.terms
    fields = {
        "model": submit.model,
        "inputs": content.inputs,
        "parameters": content.parameters,
        "deadline": terms.left,
        "service": terms.service,
        "priority": terms.priority,
        "budget": terms.budget,
        "stream": terms.stream or None,
        "outputs": terms.outputs,
        "tenant": tenant,
        "idempotency_key": submit.key,
        "locality": locality,
    }
    return parse_request(fields)


def _failure(key: str, error: TaxiwayError) -> PeerFailure:
    details = {name: value for name, value in error.details.items() if isinstance(value, str | int | float)}
    return PeerFailure(key, error.code, error.message, details)

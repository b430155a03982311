"""What a fleet does with those that connect to it: a wrong, old or hostile caller costs only its own jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest

from taxiway.contract.keys import job_key, line_key
from taxiway.contract.peers import (
    BESIDE,
    LINE,
    MESSAGE,
    MOST_JOBS,
    PATH,
    VERSION,
    WRONG_FRAME,
    WRONG_VERSION,
    Inbox,
    PeerAnswer,
    PeerCancel,
    PeerContent,
    PeerFailure,
    PeerHello,
    PeerOffers,
    PeerPart,
    PeerPing,
    PeerPong,
    PeerRefused,
    PeerServe,
    PeerSubmit,
    PeerTaken,
    PeerTerms,
    ToCaller,
    ToSite,
    WaitingLine,
    encode_frames,
    read_line,
    read_one_to_caller,
    read_one_to_site,
    read_to_caller,
    read_to_site,
)
from tests.keyring import keys_in, secret_of
from tests.routing import eventually
from tests.sites import FAR, OpenSite, messages, open_fleet
from tests.stored import record_of
from tests.working import LASTING

QUICK: dict[str, Any] = {"samples": [4], "seed": [3]}
HELLO = PeerHello(VERSION, "edge", 2**20, ("slab", "nothing"), ("bulk", "unknown"))


@pytest.fixture(scope="module")
def site(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenSite]:
    """A fleet that keeps only small messages."""
    queues = FAR.replace("limits: {lease: 3}", "limits: {payload: 64KiB}")
    folder = tmp_path_factory.mktemp("far") / "site"
    with open_fleet(valkey_url, folder, queues, "cpu.batch", lasting=True) as (opened, _):
        yield opened


class Caller:
    """Speaks frames on one connection."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.received: list[ToCaller] = []
        self._inbox = Inbox(read_to_caller, read_one_to_caller, 2**30)

    async def say(self, *frames: ToSite) -> None:
        for message in messages(*frames):
            await self.socket.send_bytes(message)

    async def hear(self, *kinds: type[ToCaller], key: str = "") -> Any:
        """The next frame of one of these kinds, of a job if one is named."""
        while True:
            for place, frame in enumerate(self.received):
                if isinstance(frame, kinds) and (not key or getattr(frame, "key", "") == key):
                    return self.received.pop(place)
            async with asyncio.timeout(60):
                message = await self.socket.receive()
            assert message.type is aiohttp.WSMsgType.BINARY, message
            self.received += self._inbox.frames(message.data)

    async def closed(self) -> tuple[int | None, str]:
        """The code and reason with which the connection is closed."""
        async with asyncio.timeout(60):
            while (message := await self.socket.receive()).type is aiohttp.WSMsgType.BINARY:
                pass
        return self.socket.close_code, str(message.extra)


@asynccontextmanager
async def calling(site: OpenSite, *first: ToSite, key: str = "") -> AsyncIterator[Caller]:
    """A connection, on which the caller says this first."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession() as session, session.ws_connect(site.url + PATH, headers=headers) as socket:
        caller = Caller(socket)
        await caller.say(*first)
        yield caller


def speak(site: OpenSite, talk: Callable[[Caller], Awaitable[Any]], *first: ToSite, key: str = "") -> Any:
    """What a caller's talk gives."""

    async def run() -> Any:
        async with calling(site, *(first or (HELLO,)), key=key) as caller:
            return await talk(caller)

    return asyncio.run(run())


def submit(key: str, inputs: dict[str, Any] = QUICK, model: str = "slab", **terms: Any) -> PeerSubmit:
    return PeerSubmit(key, model, msgspec.Raw(encode_frames(PeerContent(inputs))), PeerTerms(**terms))


def test_offers_come_for_the_models_and_services_that_both_know(site: OpenSite) -> None:
    async def talk(caller: Caller) -> None:
        assert (await caller.hear(PeerHello)).site == "cloud"
        offers: dict[str, Any] = {}
        while not offers:
            offers = (await caller.hear(PeerOffers)).offers
        assert offers.keys() == {"slab"}
        assert offers["slab"].keys() == {"", "bulk"}
        assert 0 < offers["slab"][""].seconds(1, 0) < 60

    speak(site, talk)


def test_a_key_that_was_seen_is_answered_from_the_same_job(site: OpenSite) -> None:
    async def first(caller: Caller) -> Any:
        await caller.say(submit("again#1.0"), submit("again#1.0"))
        await caller.hear(PeerTaken, key="again#1.0")
        return await caller.hear(PeerAnswer, key="again#1.0")

    def jobs() -> int:
        return len(list(site.state.scan_iter(job_key("*"))))

    before = jobs()
    answers = [speak(site, first) for _ in range(2)]
    assert answers[0].outputs == answers[1].outputs == {"estimate": [0.75]}
    assert jobs() == before + 1


def test_a_job_goes_on_when_its_caller_leaves_and_ends_when_it_comes_back_to_cancel_it(site: OpenSite) -> None:
    async def leave(caller: Caller) -> None:
        await caller.say(submit("left#1.0", LASTING))
        await caller.hear(PeerTaken)

    async def come_back(caller: Caller) -> None:
        await caller.say(PeerCancel("left#1.0"))
        await caller.say(PeerPing(7))
        assert (await caller.hear(PeerPong)).number == 7

    def states() -> list[str]:
        keys: list[Any] = list(site.state.scan_iter(job_key("*")))
        return [str(record_of(site.state, key.decode().removeprefix(job_key(""))).state) for key in keys]

    speak(site, leave)
    eventually(lambda: "running" in states())
    speak(site, come_back)
    eventually(lambda: "running" not in states() and "cancelled" in states())


AHEAD = f"expected version {VERSION} of the protocol, got 2"


@pytest.mark.parametrize(
    ("frames", "code", "reason"),
    [
        ((PeerHello(VERSION + 1, "later", 2**20),), WRONG_VERSION, AHEAD),
        ((PeerServe(VERSION + 1, "later"),), WRONG_VERSION, AHEAD),
        ((submit("early"),), WRONG_FRAME, "expected hello first"),
        ((PeerPing(1),), WRONG_FRAME, "expected hello first"),
        ((PeerServe(VERSION, "rude"), PeerPing(1)), WRONG_FRAME, "expected nothing before hello"),
        ((HELLO, PeerServe(VERSION, "both")), WRONG_FRAME, "expected hello once"),
    ],
)
def test_who_speaks_another_version_or_out_of_turn_is_refused_by_name(
    site: OpenSite, frames: tuple[ToSite, ...], code: int, reason: str
) -> None:
    async def talk(caller: Caller) -> Any:
        for frame in frames[1:]:
            await caller.say(frame)
        return await caller.closed()

    assert speak(site, talk, frames[0]) == (code, reason)
    assert speak(site, Caller.closed, *frames) == (code, reason), "in one message"


def test_what_comes_in_one_message_with_hello_is_answered(site: OpenSite) -> None:
    async def talk(caller: Caller) -> None:
        assert (await caller.hear(PeerAnswer)).key == "early#1.0"

    speak(site, talk, HELLO, submit("early#1.0"))


@pytest.mark.parametrize(
    "message", [b"", b"\xc1", b"\x91\x93\xa6submit", b"\x91\x92\xa4kill\x01", b"\xdd\xff\xff\xff\xff"]
)
def test_what_cannot_be_read_ends_the_connection_alone(site: OpenSite, message: bytes) -> None:
    async def talk(caller: Caller) -> Any:
        await caller.hear(PeerHello)
        await caller.socket.send_bytes(message)
        return await caller.closed()

    code, reason = speak(site, talk)
    assert code == WRONG_FRAME
    assert reason.startswith("malformed: ")
    assert site.client.infer("slab", QUICK, timeout=60).outputs["estimate"] == [0.75]


def test_a_message_or_frame_without_an_end_is_refused(site: OpenSite) -> None:
    async def at_once(caller: Caller) -> Any:
        await caller.socket.send_bytes(bytes(2 * MESSAGE + 1))
        return (await caller.closed())[0]

    async def in_parts(caller: Caller) -> Any:
        most = (await caller.hear(PeerHello)).bytes
        assert most == 64 * 2**10 + BESIDE
        part = b"\x91" + encode_frames(PeerPart(memoryview(bytes(2**15))))
        for _ in range(most // 2**15 + 1):
            await caller.socket.send_bytes(part)
        return await caller.closed()

    assert speak(site, at_once) == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
    assert speak(site, in_parts) == (WRONG_FRAME, f"malformed: a frame of more than {64 * 2**10 + BESIDE} bytes")
    assert site.client.infer("slab", QUICK, timeout=60).outputs["estimate"] == [0.75]


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (submit("bad#1.0", {"samples": ["text"], "seed": [1]}), "invalid_request"),
        (submit("unknown#1.0", model="nothing"), "unknown_model"),
        (submit("late#1.0", left=-1.0), "invalid_request"),
        (submit("big#1.0", {"samples": [1] * 30_000, "seed": [1] * 30_000}), "too_large"),
        (PeerSubmit("odd#1.0", "slab", msgspec.Raw(b"\xc0")), "invalid_request"),
        (submit("two\nlines"), "invalid_request"),
    ],
    ids=lambda case: case if isinstance(case, str) else case.key.strip().replace("\n", "-"),
)
def test_a_job_that_is_wrong_fails_alone(site: OpenSite, frame: PeerSubmit, code: str) -> None:
    async def talk(caller: Caller) -> Any:
        await caller.say(frame, submit("right#1.0"))
        assert (await caller.hear(PeerAnswer, key="right#1.0")).outputs == {"estimate": [0.75]}
        return await caller.hear(PeerFailure, PeerRefused, key=frame.key)

    failure = speak(site, talk)
    assert isinstance(failure, PeerFailure)
    assert failure.code == code


def test_an_answer_that_the_caller_does_not_read_is_refused_by_name(site: OpenSite) -> None:
    async def talk(caller: Caller) -> Any:
        await caller.say(submit("long#1.0", {"payload": ["x" * 5000]}, "echo"))
        return await caller.hear(PeerAnswer, PeerFailure)

    failure = speak(site, talk, PeerHello(VERSION, "edge", 1000))
    assert (failure.key, failure.code) == ("long#1.0", "too_large")
    assert "more than the site that asked reads (1000)" in failure.message


def test_more_jobs_than_a_connection_may_have_are_refused_for_now(site: OpenSite) -> None:
    async def talk(caller: Caller) -> Any:
        await caller.say(*(submit(f"many{n}#1.0", LASTING) for n in range(MOST_JOBS + 1)))
        refused = await caller.hear(PeerRefused)
        await caller.say(*(PeerCancel(f"many{n}#1.0") for n in range(MOST_JOBS)))
        return refused

    refused = speak(site, talk)
    assert "jobs that are not answered" in refused.reason
    assert refused.retry_after > 0


def test_a_job_that_would_be_late_is_refused_alone(site: OpenSite) -> None:
    async def talk(caller: Caller) -> Any:
        await caller.say(*(submit(f"many{n}#1.0", {"payload": [n]}, "slow", left=1.0) for n in range(200)))
        await caller.say(submit("late#1.0", {"payload": [0]}, "slow", left=0.1))
        return await caller.hear(PeerRefused, key="late#1.0")

    assert speak(site, talk).alone


def test_a_site_that_opens_a_connection_to_take_work_is_kept_until_a_worker_comes(site: OpenSite) -> None:
    async def talk(caller: Caller) -> None:
        async with joined(site, await waiting(site, "edge")) as worker:
            await worker.say(HELLO, PeerPing(3))
            inbox: Inbox[ToSite] = Inbox(read_to_site, read_one_to_site, 2**20)
            heard: list[ToSite] = []
            while len(heard) < 2:
                heard += inbox.frames((await caller.socket.receive()).data)
            assert heard == [HELLO, PeerPing(3)]
            await caller.socket.send_bytes(b"".join(messages(PeerPong(3))))
            assert (await worker.hear(PeerPong)).number == 3
        assert (await caller.closed())[0] == aiohttp.WSCloseCode.GOING_AWAY

    speak(site, talk, PeerServe(VERSION, "edge"))


def test_a_connection_that_waits_is_taken_once_and_by_its_token_alone(site: OpenSite) -> None:
    async def talk(caller: Caller) -> None:
        line = await waiting(site, "once")
        for url in (line.url, site.url):
            with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
                async with joined(site, WaitingLine(url, line.token[:-1])):
                    pass
        async with joined(site, line):
            with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
                async with joined(site, line):
                    pass
            await caller.socket.close()

    speak(site, talk, PeerServe(VERSION, "once"))


async def waiting(site: OpenSite, peer: str) -> WaitingLine:
    """Where a connection of a peer waits."""
    found: bytes = await asyncio.to_thread(lambda: eventually(lambda: site.state.get(line_key(peer))))
    return read_line(found)


@asynccontextmanager
async def joined(site: OpenSite, line: WaitingLine) -> AsyncIterator[Caller]:
    """A worker that takes a connection that waits."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(line.url + PATH, headers={LINE: line.token}) as socket,
    ):
        yield Caller(socket)


TENANTS = "\ntenants: {poor: {requests_per_second: 1}}\n"


@pytest.fixture(scope="module")
def guarded(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenSite]:
    """A fleet that asks callers for keys."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = keys_in(folder / "keys.jsonl", edge=("submit",), reader=("read",), poor=("submit",))
    with open_fleet(valkey_url, folder / "site", FAR + TENANTS, "cpu.batch", options=keys, lasting=True) as (site, _):
        yield site


@pytest.mark.parametrize(("key", "status"), [("", 401), ("taxiway_wrong", 401), (secret_of("reader"), 403)])
def test_a_caller_without_a_key_that_may_submit_is_refused(guarded: OpenSite, key: str, status: int) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        speak(guarded, Caller.closed, key=key)
    assert caught.value.status == status


def test_a_caller_is_the_tenant_of_its_key_with_its_quota(guarded: OpenSite) -> None:
    async def talk(caller: Caller) -> Any:
        await caller.say(submit("mine#1.0"))
        await caller.hear(PeerAnswer)

    async def too_often(caller: Caller) -> Any:
        await caller.say(*(submit(f"often{n}#1.0") for n in range(20)))
        return await caller.hear(PeerRefused)

    speak(guarded, talk, key=secret_of("edge"))
    keys: list[Any] = list(guarded.state.scan_iter(job_key("*")))
    (record,) = [record_of(guarded.state, key.decode().removeprefix(job_key(""))) for key in keys]
    assert record.tenant == "edge"
    refused = speak(guarded, too_often, key=secret_of("poor"))
    assert "rate limit exceeded" in refused.reason
    assert refused.retry_after > 0


def test_a_key_that_is_revoked_ends_its_connections(guarded: OpenSite) -> None:
    async def talk(caller: Caller) -> Any:
        await caller.hear(PeerHello)
        async with calling(guarded, PeerServe(VERSION, "poor"), key=secret_of("edge")) as served:
            await waiting(guarded, "edge")
            assert not guarded.state.exists(line_key("poor"))
            keys_in(guarded.settings.queues.parent.parent / "keys.jsonl")
            return await caller.closed(), await served.closed()

    ended = (WRONG_FRAME, "the key has ended")
    assert speak(guarded, talk, key=secret_of("edge")) == (ended, ended)

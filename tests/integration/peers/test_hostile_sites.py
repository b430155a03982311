"""What a fleet does with a site that it hands work to: one that lies or never ends costs its own jobs."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from aiohttp import WSMsgType, web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tasks.site_key import public_text
from taxiway.contract.job import Result, Tokens
from taxiway.contract.peers import (
    PATH,
    VERSION,
    Inbox,
    PeerAnswer,
    PeerFailure,
    PeerHello,
    PeerOffers,
    PeerPiece,
    PeerPing,
    PeerPong,
    PeerRefused,
    PeerSubmit,
    PeerTaken,
    SiteOffer,
    ToCaller,
    read_one_to_site,
    read_to_site,
)
from taxiway.contract.sealed import Sealed, row_of, sealed_in
from taxiway.sealing import SealKeys
from tests.builders import nested
from tests.routing import eventually
from tests.sites import NEAR, PEER, OpenSite, messages, open_fleet
from tests.stored import facts_of, record_of

QUICK = {"samples": [4], "seed": [3]}
KEY = secrets.token_bytes(32)
KEYS = SealKeys([KEY])
CHEAP = SiteOffer(0.001, 0.0, 0.0, 1.0, 1e-9, 0.0, 0.0, 100.0)


class FalseSite:
    """A site that does as it is told: `answers` are the frames with which it answers each job, made from its frame."""

    def __init__(self) -> None:
        self.version = VERSION
        self.keys: tuple[str, ...] = ()
        self.offers: dict[str, dict[str, SiteOffer]] = {"slab": {"": CHEAP}}
        self.answers: Any = lambda submit: [PeerAnswer(submit.key, {"estimate": [0.75]}, 1e-9)]
        self.key: Ed25519PrivateKey | None = None
        self.signs_for = "edge"
        self.garbage = b""
        self.deaf = False
        self.submitted: list[PeerSubmit] = []
        self.connections = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._sockets: set[web.WebSocketResponse] = set()

    @contextmanager
    def serving(self) -> Iterator[FalseSite]:
        """It listens."""
        app = web.Application()
        app.router.add_get(PATH, self._serve)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.port = runner.addresses[0][1]
        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), self._loop).result(30)
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    def say(self, *frames: ToCaller) -> None:
        """Say this on all connections."""
        for socket in list(self._sockets):
            asyncio.run_coroutine_threadsafe(_send(socket, *frames), self._loop).result(30)

    def hang_up(self) -> None:
        """Close all connections."""
        for socket in list(self._sockets):
            asyncio.run_coroutine_threadsafe(socket.close(), self._loop).result(30)

    async def _serve(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        message = await socket.receive()
        self.connections += 1
        self._sockets.add(socket)
        inbox = Inbox(read_to_site, read_one_to_site, 2**30)
        try:
            async with asyncio.TaskGroup() as both:
                offering = both.create_task(self._offer(socket))
                while message.type is WSMsgType.BINARY:
                    for frame in inbox.frames(message.data):
                        await self._take(socket, frame)
                    message = await socket.receive()
                offering.cancel()
        except* ConnectionError:
            pass
        self._sockets.discard(socket)
        return socket

    async def _take(self, socket: web.WebSocketResponse, frame: Any) -> None:
        if self.deaf:
            return
        match frame:
            case PeerHello():
                await _send(socket, PeerHello(self.version, "false", 2**24, keys=self.keys))
            case PeerPing(number=number):
                await _send(socket, PeerPong(number))
            case PeerSubmit():
                self.submitted.append(frame)
                await _send(socket, *self.answers(frame))
                if self.garbage:
                    await socket.send_bytes(self.garbage)

    async def _offer(self, socket: web.WebSocketResponse) -> None:
        while not socket.closed:
            await asyncio.sleep(0.1)
            if not self.deaf:
                offers = PeerOffers(self.offers, 1e9)
                signature = self.key.sign(offers.signed_part(self.signs_for)) if self.key else b""
                await _send(socket, msgspec.structs.replace(offers, signature=signature))


async def _send(socket: web.WebSocketResponse, *frames: ToCaller) -> None:
    for message in messages(*frames):
        await socket.send_bytes(message)


class Watched:
    """A near fleet that hands work to a false site."""

    def __init__(self, near: OpenSite, false: FalseSite, worker: str) -> None:
        self.near, self.false, self._worker = near, false, worker

    def facts(self) -> Any:
        device = facts_of(self.near.state, self._worker)
        return device, None if device.endpoint is None else device.endpoint.peer


@pytest.fixture
def watched(valkey_url: str, tmp_path: Path) -> Iterator[Watched]:
    with FalseSite().serving() as false:
        queues = NEAR.replace("URL", f"http://127.0.0.1:{false.port}")
        with open_fleet(valkey_url, tmp_path / "near", queues, PEER, "cpu.batch") as (near, workers):
            yield Watched(near, false, workers[PEER].name)


def offered(watched: Watched) -> bool:
    _, peer = watched.facts()
    return peer is not None and bool(peer.offers)


def test_an_honest_site_is_used_whatever_it_offers_that_was_not_asked_for(watched: Watched) -> None:
    watched.false.offers = {"slab": {"": CHEAP, "nobody": CHEAP}, **{f"model-{n}": {"": CHEAP} for n in range(5000)}}
    eventually(lambda: offered(watched))
    assert watched.facts()[1].offers.keys() == {"slab:1/taxiway"}
    assert watched.near.client.infer("slab", QUICK, timeout=60).report.hardware_class == PEER
    (sent,) = watched.false.submitted
    assert (sent.model, sent.terms.service, sent.terms.priority) == ("slab", None, None)
    assert 0 < (sent.terms.left or 0) <= 60


def test_a_site_of_another_version_gets_no_work(watched: Watched) -> None:
    watched.false.version = VERSION + 1
    watched.false.hang_up()
    eventually(lambda: f"version {VERSION + 1} of the protocol" in watched.facts()[0].fault)
    assert watched.near.client.infer("slab", QUICK, timeout=60).report.hardware_class == "cpu.batch"
    assert not watched.false.submitted


def test_a_site_that_takes_a_body_before_it_has_come_is_not_believed_to_be_infinitely_near(watched: Watched) -> None:
    watched.false.offers = {"echo": {"": CHEAP}}
    watched.false.answers = lambda one: [PeerTaken(one.key)] * 3
    body = {"payload": ["x" * 2**19]}
    eventually(lambda: watched.near.client.what_if("echo", body)["hardware_class"] == PEER)
    job = watched.near.client.submit("echo", body)
    eventually(lambda: watched.facts()[1].bytes_per_second > 0)
    assert watched.facts()[1].bytes_per_second < 1e13
    job.cancel()


def test_a_bill_above_the_offer_is_not_believed(watched: Watched) -> None:
    watched.false.answers = lambda one: [PeerAnswer(one.key, {"estimate": [0.75]}, 1e5, Tokens(10**9, 10**9, 10**9))]
    eventually(lambda: offered(watched))
    report = watched.near.client.infer("slab", QUICK, timeout=60).report
    assert report.hardware_class == PEER
    assert report.cost <= 2e-9
    assert report.tokens is not None and report.tokens.output <= 1


@pytest.mark.parametrize(
    "answer",
    [
        lambda one: PeerAnswer(one.key, {}, 0.0),
        lambda one: PeerAnswer(one.key, {"estimate": 0.75}, 0.0),
        lambda one: PeerAnswer(one.key, {"estimate": [1.0, 2.0]}, 0.0),
        lambda one: PeerAnswer(one.key, {"estimate": {"shape": [2**62], "datatype": "FP64", "data": b""}}, 0.0),
        lambda one: PeerAnswer(one.key, {"estimate": [nested(200)]}, 0.0),
        lambda one: PeerFailure(one.key, "device_fault", "it burns", {"message": "x", "self": 1}),
        lambda one: PeerRefused(one.key, "not now", 0.2),
        lambda one: PeerRefused(one.key, "never", 1e9),
    ],
)
def test_a_site_that_never_answers_properly_loses_the_job_to_another_class(watched: Watched, answer: Any) -> None:
    watched.false.answers = lambda one: [answer(one)]
    eventually(lambda: offered(watched))
    job = watched.near.client.submit("slab", QUICK)
    eventually(lambda: watched.false.submitted)
    watched.false.offers = {}
    result = job.result(timeout=60)
    assert (result.report.hardware_class, result.outputs["estimate"]) == ("cpu.batch", [0.75])


def test_a_job_that_the_site_refuses_alone_holds_up_no_other(watched: Watched) -> None:
    answered = watched.false.answers

    def refusing(one: PeerSubmit) -> list[ToCaller]:
        first = watched.false.submitted[0].key.partition("#")[0]
        return [PeerRefused(one.key, "too late", 1e9, alone=True)] if one.key.startswith(first) else answered(one)

    watched.false.answers = refusing
    eventually(lambda: offered(watched))
    job = watched.near.client.submit("slab", QUICK)
    eventually(lambda: watched.false.submitted)
    report = watched.near.client.infer("slab", QUICK, deadline=10, timeout=60).report
    assert report.hardware_class == PEER
    watched.false.offers = {}
    assert job.result(timeout=60).report.hardware_class == "cpu.batch"


@pytest.fixture
def sealing(valkey_url: str, tmp_path: Path) -> Iterator[Watched]:
    """A near fleet whose label `vault` is sealed, and whose false site says that it has the key."""
    public = KEYS.public(KEYS.names[0]).hex()
    with FalseSite().serving() as false:
        false.keys = KEYS.names
        queues = NEAR.replace("[ward]", "[ward, vault]").replace("URL", f"http://127.0.0.1:{false.port}")
        queues = queues.replace("device: endpoint", "device: endpoint\n    labels: [vault]")
        queues += f"locality: {{sealed: {{vault: [{public}]}}}}\n"
        folder, classes = tmp_path / "near", (PEER, "cpu.batch")
        with open_fleet(valkey_url, folder, queues, *classes, seals=(KEY,)) as (near, workers):
            watched = Watched(near, false, workers[PEER].name)
            eventually(lambda: near.client.what_if("slab", QUICK, locality="vault")["hardware_class"] == PEER)
            yield watched


def sealed_row(submit: PeerSubmit) -> Sealed:
    """The sealed content of a row that was sent."""
    sealed = sealed_in(msgspec.msgpack.decode(submit.content)[0])
    assert sealed is not None
    return sealed


def of_another_row(submit: PeerSubmit) -> dict[str, Any]:
    """An answer that was sealed with the key, for another row."""
    result = Result(model="slab:1", outputs={"estimate": [9.0]}, report=cast(Any, None))
    sealed = sealed_row(submit)
    return KEYS.seal_result(result, msgspec.structs.replace(sealed, job=f"{sealed.job}1")).outputs


@pytest.mark.parametrize(
    "outputs",
    [
        lambda one: {"estimate": [0.75]},
        lambda one: sealed_row(one).value,
        lambda one: {"__sealed__": {"keys": "all"}},
        of_another_row,
    ],
)
def test_an_answer_that_is_not_sealed_for_its_row_is_dropped_and_counted(sealing: Watched, outputs: Any) -> None:
    sealing.false.answers = lambda one: [PeerAnswer(one.key, outputs(one), 1e-9)]
    job = sealing.near.client.submit("slab", QUICK, locality="vault")
    (sent, *_) = eventually(lambda: sealing.false.submitted)
    sealing.false.offers = {}
    assert KEYS.open_inputs(sealed_row(sent), jobs=[row_of(sent.key)], model="slab")[1] == {}
    result = job.result(timeout=60)
    assert (result.report.hardware_class, result.outputs["estimate"]) == ("cpu.batch", [0.75])
    eventually(lambda: sealing.facts()[1].dropped >= 1)


def more_than(false: FalseSite, connections: int) -> bool:
    return false.connections > connections


def test_offers_that_the_site_did_not_sign_for_this_one_are_refused(valkey_url: str, tmp_path: Path) -> None:
    own, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    with FalseSite().serving() as false:
        url = f"http://127.0.0.1:{false.port}', public_key: '{public_text(own)}"
        queues = NEAR.replace('"URL"', f"'{url}'")
        with open_fleet(valkey_url, tmp_path / "near", queues, PEER, "cpu.batch") as (near, workers):
            watched = Watched(near, false, workers[PEER].name)
            eventually(lambda: "not signed with endpoint.public_key" in watched.facts()[0].fault)
            for key, site in ((other, "edge"), (own, "another")):
                false.key, false.signs_for = key, site
                eventually(partial(more_than, false, false.connections + 1))
                assert not offered(watched)
            assert near.client.infer("slab", QUICK, timeout=60).report.hardware_class == "cpu.batch"
            false.signs_for = "edge"
            eventually(lambda: offered(watched))
            assert watched.facts()[1].signed_at == 1e9


@pytest.mark.parametrize("garbage", [b"\xc1", b"text", b"\x91\x92\xa5hello\x01", b"\x91" * 100_000])
def test_what_cannot_be_read_ends_the_line_and_its_jobs_run_elsewhere(watched: Watched, garbage: bytes) -> None:
    watched.false.answers, watched.false.garbage = (lambda one: []), garbage
    eventually(lambda: offered(watched))
    job = watched.near.client.submit("slab", QUICK)
    eventually(lambda: watched.false.submitted)
    watched.false.offers = {}
    assert job.result(timeout=60).report.hardware_class == "cpu.batch"


def test_answers_that_come_again_or_for_other_jobs_are_dropped_and_counted(watched: Watched) -> None:
    watched.false.answers = lambda one: [
        PeerAnswer("stranger#1.0", {"estimate": [9.0]}, 0.0),
        PeerAnswer(one.key, {"estimate": [0.75]}, 1e-9),
        PeerAnswer(one.key, {"estimate": [8.0]}, 1e-9),
        PeerFailure(one.key, "execution", "after all"),
        PeerPiece(one.key, 0, "late"),
    ]
    eventually(lambda: offered(watched))
    jobs = [watched.near.client.submit("slab", QUICK) for _ in range(5)]
    assert [job.result(timeout=60).outputs["estimate"] for job in jobs] == [[0.75]] * 5
    eventually(lambda: watched.facts()[1].dropped == 3 * 5)
    assert {record_of(watched.near.state, job.id).state for job in jobs} == {"succeeded"}


def test_an_answer_that_comes_after_the_job_ran_at_home_is_dropped_and_counted(watched: Watched) -> None:
    watched.false.answers = lambda one: []
    eventually(lambda: offered(watched))
    job = watched.near.client.submit("slab", QUICK)
    eventually(lambda: watched.false.submitted)
    watched.false.deaf = True
    watched.false.hang_up()
    assert job.result(timeout=60).report.hardware_class == "cpu.batch"
    watched.false.deaf = False
    eventually(lambda: offered(watched))
    watched.false.say(PeerAnswer(watched.false.submitted[0].key, {"estimate": [9.0]}, 1e-9))
    eventually(lambda: watched.facts()[1].dropped == 1)
    assert watched.near.client.job(job.id).result(timeout=60).outputs["estimate"] == [0.75]


def test_a_site_that_takes_far_longer_than_it_offers_is_believed_less(watched: Watched) -> None:
    eventually(lambda: offered(watched))

    def slow(one: PeerSubmit) -> list[ToCaller]:
        threading.Timer(1.0, lambda: watched.false.say(PeerAnswer(one.key, {"estimate": [0.75]}, 1e-9))).start()
        return []

    watched.false.answers = slow
    for _ in range(3):
        watched.near.client.infer("slab", QUICK, timeout=60)
    eventually(lambda: watched.facts()[0].pace.get("slab:1/taxiway", 0.0) > 10)

    def expected() -> float:
        considered = watched.near.client.what_if("slab", QUICK)["considered"]
        return next(one["finish"] for one in considered if one["hardware_class"] == PEER)

    eventually(lambda: expected() > 0.01)

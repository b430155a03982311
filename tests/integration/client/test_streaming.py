"""Streamed answers through both interfaces of a real router and worker of an engine that says as much as it may."""

import asyncio
import signal
from collections.abc import Iterator
from typing import Any, cast

import httpx
import msgspec
import pytest
import redis

import taxiway
from tasks.settings import Settings
from taxiway.contract.job import Result
from taxiway.errors import InvalidRequestError, JobCancelledError, ResultTimeoutError, UnknownJobError
from tests.builders import ENGINE_MODELS, add_engine_models
from tests.cable import Balancer, cable_to
from tests.command_line import CommandLine
from tests.engine import Engine, serving
from tests.forked import Process
from tests.openai_fleet import QUEUES
from tests.routing import HTTP, RouterProcess, eventually, router_process
from tests.serving import ServedFleet, served_fleet
from tests.working import worker_settings

LONG = {"max_tokens": 1600}

TINY = ENGINE_MODELS["tale"].replace("name: tale", "name: tiny").replace("maximum: 512", "maximum: 1800")


@pytest.fixture(scope="module")
def fleet(lasting: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedFleet]:
    with serving(Engine(script="wait=0.002 fill")) as engine:
        queues = QUEUES.format(url=engine.url).replace("talk: served, tale: served", "tiny: served")
        settings = worker_settings(lasting, tmp_path_factory.mktemp("fleet"), queues)
        add_engine_models(settings.models, "vector")
        (settings.models / "tiny").mkdir()
        (settings.models / "tiny" / "model.yaml").write_text(TINY)
        with served_fleet(settings, "tiny") as fleet:
            yield fleet


@pytest.fixture(scope="module")
def interfaces(fleet: ServedFleet) -> dict[str, str]:
    return fleet.interfaces


@pytest.fixture
def http(fleet: ServedFleet) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.router.http, timeout=30, trust_env=False) as client:
        yield client


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The server-sent events of a response: their fields, with the data decoded."""
    fields: dict[str, Any] = {"event": ""}
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if line:
            fields[name] = msgspec.json.decode(value) if name == "data" else value
        else:
            yield fields
            fields = {"event": ""}


def ready(router: RouterProcess) -> bool:
    """Whether it takes requests: one that leaves says so for a moment, and then takes no connection."""
    try:
        return HTTP.get(f"{router.http}/v2/health/ready").is_success
    except httpx.TransportError:
        return False


def text_of(answer: list[Any]) -> str:
    return "".join(event["data"]["text_output"] for event in answer if not event["event"])


def test_text_comes_in_pieces_and_the_result_and_a_late_reader_have_all_of_it(client: taxiway.Client) -> None:
    job = client.submit("tiny", "tell me", stream=True, parameters={"max_tokens": 200})
    *streamed, result = job.stream(timeout=60)
    assert isinstance(result, Result)
    assert len(streamed) > 5
    assert "".join(map(str, streamed)) == result.outputs["text"]
    *again, last = client.job(job.id).stream(timeout=60)
    assert ("".join(map(str, again)), last) == (result.outputs["text"], result)
    assert client.infer("tiny", "tell me", parameters={"max_tokens": 200}).outputs == result.outputs


def test_the_first_text_comes_long_before_the_result_and_who_reads_no_longer_ends_nothing(
    client: taxiway.Client,
) -> None:
    job = client.submit("tiny", "tell me", stream=True, parameters=LONG)
    with pytest.raises(ResultTimeoutError):
        list(job.stream(timeout=0.3))
    streamed = job.stream(timeout=60)
    assert isinstance(next(streamed), str)
    assert not job.done()
    job.cancel()
    with pytest.raises(JobCancelledError):
        list(streamed)


def test_a_reader_at_a_router_that_stops_gets_the_rest_from_another(fleet: ServedFleet) -> None:
    asked: dict[str, Any] = {"model": "tiny", "inputs": "tell me", "parameters": LONG}

    async def read(url: str, stopping: Process) -> list[str]:
        async with taxiway.AsyncClient(url) as client:
            waiting = asyncio.create_task(client.infer(**asked))
            polling = asyncio.create_task((await client.submit(**asked)).result())
            answer = client.stream(**asked)
            texts = [str(await anext(answer))]
            stopping.send_signal(signal.SIGTERM)
            await asyncio.to_thread(eventually, lambda: not ready(first))
            stopping.send_signal(signal.SIGTERM)  # for the second time: now
            assert await asyncio.to_thread(stopping.wait, 60) == 0
            *rest, result = [event async for event in answer]
            assert isinstance(result, Result)
            texts += map(str, rest)
            results = [result, await waiting, await polling]
            return ["".join(texts), *(str(one.outputs["text"]) for one in results)]

    with router_process(fleet.settings) as first:
        eventually(lambda: ready(first))
        balancer = Balancer(*[first.http] * 10, fleet.router.http)
        answer = asyncio.run(read(balancer.url, first.process))
        balancer.close()
    assert len(set(answer)) == 1


def test_what_cannot_be_streamed_is_refused_at_both_interfaces(client: taxiway.Client) -> None:
    with pytest.raises(InvalidRequestError, match="a model that generates text"):
        list(client.stream("vector", "hello", timeout=20))
    with pytest.raises(InvalidRequestError, match="a request of one row"):
        list(client.stream("tiny", ["one", "two"], timeout=20))
    with pytest.raises(InvalidRequestError, match="stream: expected true or false, got 'yes'"):
        client.submit("tiny", "me", stream=cast(bool, "yes"))


def test_a_reader_that_reconnects_gets_what_it_has_not_read(http: httpx.Client) -> None:
    text = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["tell me more"]}
    asked = {"inputs": [text], "parameters": {"max_tokens": 300, "stream": True}}
    accepted = http.post("/v2/models/tiny/infer", json=asked, headers={"prefer": "respond-async"})
    where = f"{accepted.headers['location']}/stream"
    read = []
    with http.stream("GET", where) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for event in events(response):
            read.append(event)
            if len(read) == 3:
                break
    with http.stream("GET", where, headers={"last-event-id": read[-1]["id"]}) as response:
        rest = list(events(response))
    assert text_of(rest)
    assert text_of(read) + text_of(rest) == rest[-1]["data"]["outputs"][0]["data"][0]
    with http.stream("GET", where) as response:  # a late reader gets all of it
        assert text_of(list(events(response))) == text_of(read) + text_of(rest)


@pytest.mark.parametrize("interface", ["broker", "http"])
def test_the_python_client_comes_back_by_itself(fleet: ServedFleet, interface: str) -> None:
    with cable_to(fleet.interfaces[interface]) as (cable, url), taxiway.Client(url, connect_timeout=60) as client:
        streamed = client.stream("tiny", "tell me", timeout=60, parameters={"max_tokens": 400})
        read = [next(streamed)]
        cable.pull()
        cable.plug()
        *rest, result = streamed
    assert isinstance(result, Result)
    assert "".join(map(str, read + rest)) == result.outputs["text"]


def test_a_reader_who_stops_leaves_no_connection_behind(fleet: ServedFleet, state: redis.Redis) -> None:
    def reading() -> set[str]:
        return {one["id"] for one in state.client_list() if one["cmd"] == "xread"}

    routers = reading()  # a router keeps the connections of readers that left, and their last command is shown
    with taxiway.Client(fleet.settings.broker) as client:
        job = client.submit("tiny", "tell me", stream=True, parameters=LONG)
        streamed: Any = job.stream(timeout=60)  # a generator
        assert isinstance(next(streamed), str)
        assert reading() - routers
        streamed.close()
        eventually(lambda: not reading() - routers)
        job.cancel()


def test_a_stream_of_no_job_and_an_id_of_no_event_are_refused(http: httpx.Client, client: taxiway.Client) -> None:
    missing = http.get("/v2/jobs/nothing/stream")
    assert (missing.status_code, missing.json()["code"]) == (404, UnknownJobError.code)
    job = client.submit("tiny", "tell me", parameters={"max_tokens": 1})
    job.result(timeout=30)
    wrong = http.get(f"/v2/jobs/{job.id}/stream", headers={"last-event-id": "yesterday"})
    assert (wrong.status_code, wrong.json()["details"]["field"]) == (400, "last-event-id")


def test_the_command_line_prints_text_as_it_comes_and_json_lines_on_request(
    fleet: ServedFleet, cli: CommandLine
) -> None:
    def printed(*options: str) -> str:
        asked = ("submit", "tiny", "--text", "tell me", "-p", "max_tokens=400", "--stream", "--url", fleet.router.http)
        return cli.succeed(*asked, *options).stdout

    *lines, last = (msgspec.json.decode(line) for line in printed("--json").splitlines())
    assert len(lines) > 5
    assert "".join(line["text"] for line in lines) == last["outputs"]["text"]
    assert printed() == last["outputs"]["text"] + "\n"

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import redis
from celery import Celery, chord

from local.fleet import LocalFleet, ProcessState, read_fleet
from tasks.settings import TREE
from taxiway import Client
from taxiway.contract.keys import ARRIVALS, INFER, PLAN
from tests.acceptance.running import start_fleet, taxiway
from tests.builders import recorded
from tests.narrowing import present
from tests.producing import QUORUM
from tests.routing import HTTP
from tests.waiting import gone, until

SCALED = recorded("fleets/scaled.yaml")


@pytest.fixture
def small_fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    yield start_fleet(tmp_path / "data", "--no-flower", "--workers", "cpu.batch=1", "--workers", "cpu.llama=0")
    taxiway("down", "--data", str(tmp_path / "data"))


def test_every_interface_of_a_fleet_that_says_it_is_up_answers(fleet: LocalFleet) -> None:
    assert HTTP.get(f"{fleet.http}/v2/health/ready").status_code == 200
    assert HTTP.get(f"{fleet.flower}/healthcheck").status_code == 200
    for address in (fleet.broker, present(fleet.socket)):
        with Client(address) as client:
            assert client.infer("echo", "hello", deadline=30).outputs == {"payload": "hello"}
    with Celery(broker=fleet.celery_broker, backend=fleet.celery_broker, set_as_current=False) as producer:
        answer = producer.send_task(INFER, kwargs={"model": "echo", "inputs": "hello"}, queue=ARRIVALS)
        assert answer.get(timeout=30)["outputs"] == {"payload": "hello"}


def test_a_second_fleet_from_the_same_directory_is_refused(fleet: LocalFleet) -> None:
    command = [sys.executable, "-m", "taxiway", "up", "--data", fleet.data]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode != 0
    assert f"process {fleet.pid}" in second.stderr


def test_a_worker_that_is_killed_leaves_the_status_at_once_and_comes_back_with_its_reason(
    small_fleet: LocalFleet,
) -> None:
    here = {"TAXIWAY_DATA": small_fleet.data}
    worker = small_fleet.workers[0]
    with Client(small_fleet.http) as client:  # quicker than the command, which may miss the moment
        os.kill(worker.pid, signal.SIGKILL)
        assert until(lambda: not client.fleet()["devices"])
        assert until(lambda: client.fleet()["devices"] != [], timeout=120)

    status = json.loads(taxiway("status", "--json", settings=here))
    restarted = next(one for one in status["processes"] if one["name"] == "cpu.batch.cpu-0")
    assert (restarted["restarts"], restarted["last_exit"]["why"]) == (1, "killed by SIGKILL (out of memory?)")
    assert "killed by SIGKILL" in taxiway("status", settings=here)
    findings = json.loads(taxiway("doctor", "--json", settings=here))["findings"]
    [finding] = [one for one in findings if one["subject"].startswith("process cpu.batch.cpu-0@")]
    assert "SIGKILL" in finding["value"]
    with Client(small_fleet.broker) as client:
        assert client.infer("echo", "again", deadline=60, timeout=60).outputs == {"payload": "again"}


@pytest.mark.rabbitmq
def test_a_fleet_serves_producers_that_have_rabbitmq_as_their_broker(tmp_path: Path, rabbit: str) -> None:
    arguments = ("--no-flower", "--workers", "cpu.batch=1", "--workers", "cpu.llama=0")
    fleet = start_fleet(tmp_path, *arguments, settings={"TAXIWAY_AMQP": rabbit})
    try:
        with Celery(broker=rabbit, backend=fleet.broker, set_as_current=False) as producer:
            producer.conf.task_queues = [QUORUM]
            kwargs = {"model": "echo", "inputs": "by rabbit", "deadline": 60}
            asks = producer.signature("taxiway.infer", kwargs=kwargs, queue="taxiway.arrivals")
            answers = chord([asks, asks], body=asks).apply_async()
            assert answers.get(timeout=60)["outputs"] == {"payload": "by rabbit"}
    finally:
        taxiway("down", "--data", str(tmp_path))


def test_a_class_that_is_scaled_begins_with_no_worker_gets_one_for_its_first_job_and_loses_it_again(
    tmp_path: Path,
) -> None:
    (tmp_path / "queues.yaml").write_text(SCALED)
    data, settings = tmp_path / "data", {"TAXIWAY_QUEUES": str(tmp_path / "queues.yaml")}
    fleet = start_fleet(data, "--no-flower", "--no-fetch", "--autoscale", settings=settings)
    try:
        assert fleet.workers == ()
        with Client(fleet.http) as client:
            job = client.submit("echo", "first")
            assert until(lambda: present(read_fleet(data)).workers != (), timeout=120)
            assert job.result(timeout=60).outputs == {"payload": "first"}
        assert until(lambda: present(read_fleet(data)).workers == ())
        with redis.Redis.from_url(fleet.broker) as store:
            store.set(PLAN, b"{")
        taxiway("down", "--data", str(data))
        with Client(start_fleet(data, "--no-flower", settings=settings).http) as client:
            assert client.fleet()["plan"]["not_followed"] == ""
    finally:
        taxiway("down", "--data", str(data))


@pytest.mark.slow
def test_the_demo_answers_every_input_on_all_classes_and_leaves_nothing_running() -> None:
    command = [sys.executable, "-m", "examples.demo", "--json"]
    demo = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=TREE, check=False)
    assert demo.returncode == 0, demo.stderr[-3000:]
    reply = json.loads(demo.stdout)
    assert len(reply["answers"]) >= 60
    classes = {answer["hardware_class"] for answer in reply["answers"]}
    assert classes >= {"cpu.batch", "gpu.realtime", "tpu.bulk"}
    assert ("cpu.llama" in classes) == (find_spec("xllamacpp") is not None), demo.stderr
    assert gone(reply["supervisor"])


def processes(data: Path) -> dict[str, ProcessState]:
    """What `taxiway status` shows of the supervisor's processes, without the broker."""
    return {one.name: one for one in present(read_fleet(data)).processes if one.name != "broker"}


def came_back(data: Path, name: str, before: int | None) -> bool:
    now = processes(data)[name]
    return now.ready and now.pid != before


def test_a_class_is_added_and_processes_that_are_ended_start_again_while_the_fleet_serves(tmp_path: Path) -> None:
    queues, data = tmp_path / "queues.yaml", tmp_path / "data"
    queues.write_text(SCALED)
    here = {"TAXIWAY_QUEUES": str(queues), "TAXIWAY_DATA": str(data)}
    fleet = start_fleet(data, "--no-flower", "--workers", "cpu.batch=1", settings=here)
    more = "{device: cpu, runtimes: [echo], concurrency: 1, max_batch: 4, max_wait: 0, price: {usd_per_hour: 1}}"
    try:
        queues.write_text(SCALED.replace("service:", f"  cpu.more: {more}\nservice:", 1))
        with Client(fleet.http) as client:
            assert until(lambda: len(client.fleet()["devices"]) == 2)
        assert not json.loads(taxiway("status", "--json", settings=here))["restart"]

        for name, before in processes(data).items():
            os.kill(present(before.pid), signal.SIGTERM)
            assert until(partial(came_back, data, name, before.pid))
        with Client(fleet.http) as client:
            assert client.infer("echo", "again", deadline=60, timeout=60).outputs == {"payload": "again"}
        assert {one.restarts for one in processes(data).values()} == {0}
    finally:
        taxiway("down", settings=here)

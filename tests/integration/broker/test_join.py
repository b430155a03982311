"""A machine that joins a fleet with its class's account at the broker and the fleet's key alone, over TLS."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

import taxiway
from broker.accounts import joining
from tasks.queues.queues_file import PublishedQueues
from tasks.settings import TREE, Settings
from taxiway.contract.keys import QUEUES
from taxiway.release import release
from tests.guarded import Guarded
from tests.routing import eventually, router_process
from tests.working import CLASS, worker_settings


@pytest.fixture(scope="module")
def fleet(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A router, and no worker."""
    folder = tmp_path_factory.mktemp("fleet")
    base = Settings(guarded.url("router"), (secrets.token_bytes(32),), TREE / "queues.yaml", TREE / "models", folder)
    base = worker_settings(base, folder)
    with router_process(base), guarded.client("test") as state:
        eventually(lambda: state.exists(QUEUES))
        yield base


def join(fleet: Settings, url: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    """`taxiway join` on another machine: it has a cache and models of its own, and no queues.yaml."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    environment |= {"TAXIWAY_SECRET": fleet.environment()["TAXIWAY_SECRET"], "TAXIWAY_CACHE": str(folder)}
    environment |= {"TAXIWAY_MODELS": str(fleet.models)}
    command = [sys.executable, "-m", "taxiway", "join", url, *options]
    return subprocess.Popen(command, cwd=TREE, env=environment, stdout=-1, stderr=-1, text=True)


def failure(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_a_machine_serves_its_class_and_drains_and_its_account_was_refused_nothing(
    fleet: Settings, guarded: Guarded, tmp_path: Path
) -> None:
    with guarded.client("test") as state:
        state.execute_command("ACL", "LOG", "RESET")
        url = guarded.url(joining(CLASS))
        with join(fleet, url, tmp_path, "--class", CLASS, "--name", "lab") as machine:
            try:
                assert machine.stdout is not None
                ready = msgspec.json.decode(machine.stdout.readline())
                assert ready["worker"].startswith("lab@")
                with taxiway.Client(guarded.url("producer")) as client:
                    assert client.infer("echo", "hello", timeout=60).outputs == {"payload": "hello"}
                machine.send_signal(signal.SIGTERM)
                assert machine.wait(60) == 0
            finally:
                machine.kill()
        assert state.execute_command("ACL", "LOG") == []


def test_the_account_reaches_no_other_class(guarded: Guarded) -> None:
    with guarded.client(joining(CLASS)) as client:
        assert client.llen(CLASS) == 0
        with pytest.raises(redis.ResponseError, match="permission"):
            client.llen("gpu.realtime")


def test_another_release_and_another_class_are_refused(fleet: Settings, guarded: Guarded, tmp_path: Path) -> None:
    url = guarded.url(joining(CLASS))
    status, errors = failure(join(fleet, url, tmp_path, "--class", "lab.cpu"))
    assert (status, "expected one of cpu.batch, gpu.realtime, got 'lab.cpu'" in errors) == (2, True)
    with guarded.client("test") as state:
        other = msgspec.structs.replace(
            msgspec.json.decode(state.get(QUEUES) or b"", type=PublishedQueues), release="9"
        )
        state.set(QUEUES, msgspec.json.encode(other))
        status, errors = failure(join(fleet, url, tmp_path, "--class", CLASS))
    assert (status, f"the fleet runs taxiway 9, this machine has {release()}" in errors) == (3, True)

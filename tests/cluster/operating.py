"""The operator as a process under its own account, a stand-in for the routers' answers, and workers behind pods."""

from __future__ import annotations

import base64
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from local.embedded import EmbeddedValkey
from tasks.settings import TREE, Settings, settings_from
from tests.builders import recorded
from tests.cluster.chart import Release, ready
from tests.cluster.control_plane import until
from tests.waiting import Watcher


class Wishes:
    """Answers like a router: how many devices a class should have, and what each device holds."""

    def __init__(self) -> None:
        self.wanted: dict[str, int] = {}
        self.devices: list[dict[str, Any]] = []
        wishes = self

        class Interface(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the name is http.server's
                name = urlsplit(self.path).path.split("/")[3]
                self._say({"replicas": wishes.wanted.get(name, 0), "reason": f"{name} was asked for"})

            def do_GET(self) -> None:
                if "/v1/scaling" in self.path:
                    return self.do_POST()
                return self._say({"devices": wishes.devices})

            def _say(self, answer: Any) -> None:
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: the test's output is no access log."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Interface)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Wishes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Controller:
    """The operator's process."""

    def __init__(self, release: Release, folder: Path) -> None:
        self._folder, self._log = folder, folder / "controller.log"
        self._config = _config(release, folder)
        self._namespace = release.namespace
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {
            **os.environ, "KUBECONFIG": str(self._config), "TAXIWAY_NAMESPACE": self._namespace,
            "PYTHONPATH": str(TREE), "TMPDIR": str(self._folder),
        }  # fmt: skip
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "controller"]
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """End it in the middle of whatever it does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """End it as Kubernetes does; its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(20)

    @property
    def log(self) -> str:
        return self._log.read_text()


def _config(release: Release, folder: Path) -> Path:
    """A kubeconfig of the controller's service account."""
    plane, account = release.plane, f"{release.name}-controller"
    secret: list[Any] = []

    def minted() -> bool:
        found = plane.items(f"/api/v1/namespaces/{release.namespace}/secrets")
        secret[:] = [one for one in found if one["metadata"]["name"].startswith(f"{account}-token")]
        return bool(secret)

    assert until(minted)
    config = json.loads(plane.kubeconfig.read_text())
    config["users"] = [{"name": "admin", "user": {"token": base64.b64decode(secret[0]["data"]["token"]).decode()}}]
    path = folder / "controller.kubeconfig"
    path.write_text(json.dumps(config))
    return path


@contextmanager
def operated(release: Release, folder: Path, router: str) -> Iterator[Controller]:
    """The operator at work on a fleet whose resources ask `router`."""
    path = f"/apis/taxiway.dev/v1alpha1/namespaces/{release.namespace}/hardwareclasses"
    for one in release.plane.items(path):
        release.plane.patch(f"{path}/{one['metadata']['name']}", {"spec": {"router": router}})
    controller = Controller(release, folder)
    controller.start()
    try:
        yield controller
    finally:
        controller.kill()


QUEUES = recorded("fleets/operated.yaml")


@contextmanager
def store_and_model(folder: Path) -> Iterator[Settings]:
    """A store, a queues.yaml of one class of three devices at most, and a model that takes a fifth of a second."""
    models = folder / "models" / "paced"
    models.mkdir(parents=True)
    text = (TREE / "models" / "paced" / "model.yaml").read_text()
    slow = text.replace("entry: paced", "entry: paced=0.2+0.001").replace("base: 0.005", "base: 0.2")
    (models / "model.yaml").write_text(slow)
    (folder / "queues.yaml").write_text(QUEUES)
    with EmbeddedValkey(folder / "store") as store:
        variables = {
            "TAXIWAY_BROKER": store.url, "TAXIWAY_SECRET": "00" * 32, "TAXIWAY_MODELS": str(models.parent),
            "TAXIWAY_QUEUES": str(folder / "queues.yaml"),
        }  # fmt: skip
        yield settings_from(variables)


@dataclass
class Machines:
    """Runs a real worker for each ready pod, and stops it as the pod goes."""

    release: Release
    settings: Settings
    over: threading.Event = field(default_factory=threading.Event)
    workers: dict[str, tuple[int, subprocess.Popen[bytes]]] = field(default_factory=dict)
    ended: list[subprocess.Popen[bytes]] = field(default_factory=list)
    most: int = 0

    def run(self) -> None:
        while not self.over.wait(0.3):
            pods = self.release.of_class("gpu.realtime")
            here = {pod["metadata"]["name"] for pod in pods if ready([pod])}
            self.most = max(self.most, len(here))
            for name in self.workers.keys() - here:
                worker = self.workers.pop(name)[1]
                worker.terminate()
                self.ended.append(worker)
            for name in here - self.workers.keys():
                slots = {slot for slot, _ in self.workers.values()}
                slot = next(index for index in range(100) if index not in slots)
                self.workers[name] = (slot, self._start(name, slot))

    def _start(self, name: str, slot: int) -> subprocess.Popen[bytes]:
        options = ["--class", "gpu.realtime", "--device", f"cuda:{slot}", "--emulate", "--name", name]
        command = [sys.executable, "-m", "workers", *options, "--loglevel", "WARNING"]
        return subprocess.Popen(command, env=self._variables(), cwd=TREE)

    def _variables(self) -> dict[str, str]:
        return {**os.environ, **self.settings.environment()}

    def kill(self) -> None:
        """End what still runs."""
        for worker in (*self.ended, *(worker for _, worker in self.workers.values())):
            worker.kill()
            worker.wait()


@dataclass
class Watch(Watcher):
    """Compares the replicas of a class's Deployment with its router's wish, five times a second, in a thread."""

    release: Release
    router: str
    looks: list[tuple[float, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def watch(self) -> None:
        while not self.over.wait(0.2):
            answer = httpx.get(f"{self.router}/v1/scaling/gpu.realtime", timeout=10)
            if answer.is_success:  # the router does not know at first
                replicas = self.release.deployment("worker-gpu-realtime")["spec"]["replicas"]
                self.looks.append((time.monotonic(), answer.json()["replicas"], replicas))

    def late(self, away: tuple[float, float]) -> list[float]:
        """Seconds for which replicas were too few or too many each time, but for while the operator was `away`."""
        found = []
        began, way = 0.0, 0
        for now, wish, replicas in self.looks:
            current = (wish > replicas) - (wish < replicas)
            if way and current != way and not (began < away[1] and now > away[0]):
                found.append(now - began)
            if current != way:
                began, way = now, current
        return found

"""Load, depth, replicas, workers: a real router and real workers behind the pods of a real API server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from local.embedded import EmbeddedValkey
from tasks.settings import TREE, Settings, settings_from
from taxiway import Client
from tests.cluster.chart import FLEET, Release, ready
from tests.cluster.control_plane import API, ControlPlane, Kubelets, add_node, until
from tests.cluster.operating import operated
from tests.routing import router_process

QUEUES = """
hardware:
  gpu.realtime:
    device: cuda
    runtimes: [echo]
    max_batch: 1
    max_wait: 0
    price: {usd_per_hour: 0.7}
    scaling: {start: 2, maximum: 3}
service: {standard: {deadline: 12}}
default_service: standard
"""

CLASS = "/apis/taxiway.dev/v1alpha1/namespaces/closed/hardwareclasses/fleet-worker-gpu-realtime"

JOBS, PATIENCE = 240, 280
"""Jobs of a fifth of a second each, due in so many seconds: 48 device seconds, for a service whose deadline is 12 s.

Two workers need 24 s: three are still wanted when the operator is back from a restart that takes less than 12 s.
"""


@dataclass
class Machines:
    """Runs a real worker for each ready pod, and stops it with SIGTERM when the pod goes."""

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
                self.workers[name] = (slot, self._start(slot))

    def _start(self, slot: int) -> subprocess.Popen[bytes]:
        options = ["--class", "gpu.realtime", "--device", f"cuda:{slot}", "--emulate", "--loglevel", "WARNING"]
        return subprocess.Popen([sys.executable, "-m", "workers", *options], env=self._variables(), cwd=TREE)

    def _variables(self) -> dict[str, str]:
        return {**os.environ, **self.settings.environment()}

    def kill(self) -> None:
        """End what still runs."""
        for worker in (*self.ended, *(worker for _, worker in self.workers.values())):
            worker.kill()
            worker.wait()


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """A store, a queues.yaml of one class, and a model that takes a fifth of a second."""
    models = tmp_path / "models" / "paced"
    models.mkdir(parents=True)
    text = (TREE / "models" / "paced" / "model.yaml").read_text()
    slow = text.replace("entry: paced", "entry: paced=0.2+0.001").replace("base: 0.005", "base: 0.2")
    (models / "model.yaml").write_text(slow)
    (tmp_path / "queues.yaml").write_text(QUEUES)
    with EmbeddedValkey(tmp_path / "store") as store:
        variables = {
            "TAXIWAY_BROKER": store.url, "TAXIWAY_SECRET": "00" * 32, "TAXIWAY_MODELS": str(models.parent),
            "TAXIWAY_QUEUES": str(tmp_path / "queues.yaml"),
        }  # fmt: skip
        yield settings_from(variables)


def test_load_starts_workers_that_serve_it_and_end_again_and_no_job_is_lost(
    plane: ControlPlane, kubelets: Kubelets, chart: Path, settings: Settings, tmp_path: Path
) -> None:
    add_node(plane, "l4", {"cloud.google.com/gke-accelerator": "nvidia-l4"}, "", {"nvidia.com/gpu": "4"})
    release = Release(plane, chart, "closed")
    hardware = {"gpu.realtime": {**FLEET["hardware"]["gpu.realtime"], "scaling": {}}}
    classes = {"gpu.realtime": {"accelerator": "nvidia-l4"}}
    release.upgrade({**FLEET, "hardware": hardware}, {"cloud": "gke", "autoscaler": "controller", "classes": classes})
    machines = Machines(release, settings)
    thread = threading.Thread(target=machines.run)
    with ExitStack() as stack:
        stack.callback(plane.http.request, "DELETE", API["Node"])
        stack.callback(release.helm, "uninstall")
        router = stack.enter_context(router_process(settings))
        controller = stack.enter_context(operated(release, tmp_path, router.http))
        thread.start()
        stack.callback(machines.kill)
        stack.callback(thread.join)
        stack.callback(machines.over.set)
        client = stack.enter_context(Client(settings.broker))
        assert until(lambda: "wanted" in plane.get(CLASS).get("status", {}), patience=60), controller.log
        jobs = [client.submit("paced", str(number), deadline=PATIENCE) for number in range(JOBS)]
        assert until(lambda: machines.most > 0, patience=60), controller.log
        controller.kill()
        controller.start()
        answers = [job.result(timeout=PATIENCE).outputs["payload"] for job in jobs]
        assert answers == [str(number) for number in range(JOBS)]
        assert machines.most == 3
        assert until(lambda: release.of_class("gpu.realtime") == [], patience=60), controller.log
        assert until(lambda: machines.workers == {})
        assert {worker.wait(60) for worker in machines.ended} == {0}

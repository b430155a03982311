"""Load, depth, replicas, workers: a real router and real workers behind the pods of a real API server."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from controller.operator import RECONCILE_EVERY
from tasks.settings import Settings
from taxiway import Client
from tests.cluster.chart import FLEET, Release
from tests.cluster.control_plane import API, ControlPlane, Kubelets, add_node, until
from tests.cluster.operating import Controller, Machines, Watch, operated, store_and_model
from tests.routing import router_process

CLASS = "/apis/taxiway.dev/v1alpha1/namespaces/closed/hardwareclasses/fleet-worker-gpu-realtime"

LEASE = "/apis/coordination.k8s.io/v1/namespaces/closed/leases/taxiway-controller"

JOBS, TIMEOUT = 240, 280
"""Jobs of a fifth of a second each, due in so many seconds: 48 device seconds, for a service whose deadline is 12 s.

Two workers need 24 s: three are still wanted when the operator is back from a restart that takes less than 12 s.
"""


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    with store_and_model(tmp_path) as found:
        yield found


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
        watch = stack.enter_context(Watch(release, router.http))
        client = stack.enter_context(Client(settings.broker))
        assert until(lambda: "wanted" in plane.get(CLASS).get("status", {}), timeout=60), controller.log
        jobs = [client.submit("paced", str(number), deadline=TIMEOUT) for number in range(JOBS)]
        assert until(lambda: machines.most > 0, timeout=60), controller.log
        away = die_and_return(release, controller)
        answers = [job.result(timeout=TIMEOUT).outputs["payload"] for job in jobs]
        assert answers == [str(number) for number in range(JOBS)]
        assert machines.most == 3
        assert until(lambda: release.of_class("gpu.realtime") == [], timeout=60), controller.log
        assert until(lambda: machines.workers == {})
        assert {worker.wait(60) for worker in machines.ended} == {0}
    late = watch.late(away)
    assert statistics.median(late) < 3, late


def die_and_return(release: Release, controller: Controller) -> tuple[float, float]:
    """From when until when there is no operator."""
    began = time.monotonic()
    controller.kill()
    release.plane.http.request("DELETE", LEASE)  # as if its time were over
    controller.start()
    assert until(lambda: release.plane.get(LEASE) is not None, timeout=60), controller.log
    return began, time.monotonic() + 2 * RECONCILE_EVERY

"""No job is lost over 50 drains, 20 deaths of the operator and 20 switches of pools; how soon replicas follow a wish.

It takes minutes and prints its figures, so `make cluster` leaves it out. After one `make cluster`:

    TAXIWAY_KUBERNETES=build/kubernetes pytest -s --timeout 3600 tests/cluster/endurance.py
"""

from __future__ import annotations

import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tasks.settings import Settings
from taxiway import Client, Job
from tests.cluster.chart import FLEET, Release, ready
from tests.cluster.control_plane import API, ControlPlane, Kubelets, add_node, until
from tests.cluster.operating import Controller, Machines, Watch, Wishes, operated, store_and_model, wish_of
from tests.cluster.test_autoscaler import measure, metered
from tests.routing import router_process

DRAINS, DEATHS, SWITCHES = 50, 20, 20
PERIOD, DEADLINE = 0.12, 900.0
"""Seconds between two jobs, each of which needs a fifth of a second, and until each is due."""

SPACE = "/apis/taxiway.dev/v1alpha1/namespaces/endured"
L4, SPOT = "cloud.google.com/gke-accelerator", "cloud.google.com/gke-spot"
NAME = "gpu.realtime"
VALUES: dict[str, Any] = {
    "cloud": "gke",
    "autoscaler": "controller",
    "classes": {
        NAME: {
            "accelerator": "nvidia-l4",
            "pools": [{"name": "other", "accelerator": "nvidia-l4", "capacity": "on-demand"}],
        }
    },
    "controller": {"times": {"stockOut": 1, "retry": 1, "hold": 0}},
}


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    with store_and_model(tmp_path) as found:
        yield found


@pytest.fixture
def fleet(plane: ControlPlane, kubelets: Kubelets, chart: Path) -> Iterator[Release]:
    """A spot node and one on demand, of four devices each."""
    add_node(plane, "cpu", {})
    add_node(plane, "l4", {L4: "nvidia-l4"}, "", {"nvidia.com/gpu": "4"})
    add_spot(plane)
    release = Release(plane, chart, "endured")
    spot = {**FLEET["hardware"]["gpu.spot"], "scaling": {}}
    release.upgrade({**FLEET, "hardware": {NAME: spot}}, VALUES)
    yield release
    release.helm("uninstall")
    plane.http.request("DELETE", API["Node"])


def add_spot(plane: ControlPlane) -> None:
    add_node(plane, "l4-spot", {L4: "nvidia-l4", SPOT: "true"}, "", {"nvidia.com/gpu": "4"})


@dataclass
class Load:
    """Submits jobs one after the other until it is over."""

    client: Client
    over: threading.Event = field(default_factory=threading.Event)
    jobs: list[Job] = field(default_factory=list)

    def run(self) -> None:
        while not self.over.wait(PERIOD):
            self.jobs.append(self.client.submit("paced", str(len(self.jobs)), deadline=DEADLINE))


def phase_of(fleet: Release) -> str:
    """What is thought of the first pool."""
    found: str = fleet.plane.get(f"{SPACE}/hardwareclasses/fleet-worker-gpu-realtime")["status"]["pools"][0]["phase"]
    return found


def serving(router: str) -> int:
    """The workers that take jobs."""
    devices: list[Any] = httpx.get(f"{router}/v2/fleet", timeout=10).json()["devices"]
    return sum(not one.get("draining", False) for one in devices)


def drain_one(fleet: Release, machines: Machines, router: str) -> None:
    """Delete the pod whose worker runs for the longest, as a node that is emptied does, while another one serves."""
    assert until(lambda: bool(machines.workers) and serving(router) > 1, timeout=180)
    name, before = next(iter(machines.workers)), len(machines.ended)
    fleet.plane.http.request("DELETE", f"/api/v1/namespaces/endured/pods/{name}")
    assert until(lambda: len(machines.ended) > before, timeout=60)


def switch(fleet: Release, machines: Machines) -> None:
    """The spot node goes with its pods, their class moves to the other pool, and back once there is one again."""
    fleet.plane.http.request("DELETE", f"{API['Node']}/l4-spot")
    for pod in fleet.of_class(NAME, "first"):
        machines.lost.add(pod["metadata"]["name"])
        path = f"/api/v1/namespaces/endured/pods/{pod['metadata']['name']}"
        fleet.plane.http.request("DELETE", path, json={"gracePeriodSeconds": 0})
    assert until(lambda: ready(fleet.of_class(NAME, "other")) > 0, timeout=90)
    add_spot(fleet.plane)
    assert until(lambda: phase_of(fleet) == "trusted" and not fleet.of_class(NAME, "other"), timeout=120)


def test_no_job_is_lost_over_drains_deaths_and_switches(fleet: Release, settings: Settings, tmp_path: Path) -> None:
    machines = Machines(fleet, settings)
    began = time.monotonic()
    with ExitStack() as stack:
        router = stack.enter_context(router_process(settings))
        controller = stack.enter_context(operated(fleet, tmp_path, router.http))
        watching = threading.Thread(target=machines.run)
        watching.start()
        for end in (machines.kill, watching.join, machines.over.set):
            stack.callback(end)
        path = f"{SPACE}/hardwareclasses/fleet-worker-gpu-realtime"
        assert until(lambda: "wanted" in fleet.plane.get(path).get("status", {}), timeout=90), controller.log
        load = Load(stack.enter_context(Client(settings.broker)))
        submitting = threading.Thread(target=load.run)
        submitting.start()
        for end in (submitting.join, load.over.set):
            stack.callback(end)
        for number in range(DRAINS):
            drain_one(fleet, machines, router.http)
            if number * DEATHS // DRAINS < (number + 1) * DEATHS // DRAINS:
                revive(fleet, controller)
            if number * SWITCHES // 2 // DRAINS < (number + 1) * SWITCHES // 2 // DRAINS:
                switch(fleet, machines)
        load.over.set()
        submitting.join()
        answers = [job.result(timeout=DEADLINE).outputs["payload"] for job in load.jobs]
        lost = sum(answer != str(number) for number, answer in enumerate(answers))
        ended = {worker.wait(60) for worker in machines.ended}
    said = (
        f"{len(answers)} jobs, {lost} lost: {len(machines.ended)} drains, {len(machines.lost)} workers lost at once, "
    )
    sys.stdout.write(f"\n{said}{DEATHS} deaths, {SWITCHES} switches, {time.monotonic() - began:.0f} s\n")
    assert lost == 0
    assert ended <= {0, -signal.SIGTERM}  # one that was still starting ends by the signal


def revive(fleet: Release, controller: Controller) -> None:
    """The operator dies, and another one leads."""
    controller.kill()
    fleet.plane.http.request("DELETE", "/apis/coordination.k8s.io/v1/namespaces/endured/leases/taxiway-controller")
    controller.start()


def test_how_soon_a_wish_is_in_the_deployment(fleet: Release, tmp_path: Path) -> None:
    took: dict[str, list[float]] = {"up": [], "down": []}
    with Wishes() as wishes, operated(fleet, tmp_path, wishes.url):
        for count in (0, 3, 1, 4, 2, 3, 0, 4, 1, 2, 0):
            before = fleet.deployment("worker-gpu-realtime")["spec"]["replicas"]
            wishes.wanted[NAME], began = count, time.monotonic()
            assert until(partial(_asks, fleet, count), timeout=60)
            took["up" if count > before else "down"].append(time.monotonic() - began)
    say("wish to Deployment", {way: seconds[1:] for way, seconds in took.items()})


def _asks(fleet: Release, count: int) -> bool:
    found: int = fleet.deployment("worker-gpu-realtime")["spec"]["replicas"]
    return found == count


def say(what: str, took: dict[str, list[float]]) -> None:
    for way, seconds in took.items():
        half, most = statistics.median(seconds or [0.0]), max(seconds, default=0.0)
        sys.stdout.write(f"\n{what}, {way}: {len(seconds)} times, median {half:.1f} s, most {most:.1f} s\n")


SURGE, IMPATIENCE = 240, 280.0
"""Jobs of a flash crowd, which three devices serve in 16 s; those that are due later than this wait for one device."""

PAUSES = (0, 4, 8, 12)
"""Seconds before each crowd, so that they meet an HPA at several moments between its looks."""


@pytest.fixture
def usual_plane(binaries: Path, tmp_path: Path) -> Iterator[ControlPlane]:
    """A control plane whose HPA controller looks as often as Kubernetes' own does."""
    folder = tmp_path / "plane"
    folder.mkdir()
    with ControlPlane(folder, binaries, hpa_period=15) as running:
        yield running


@pytest.mark.parametrize("autoscaler", ["controller", "hpa"])
def test_how_soon_replicas_follow_a_flash_crowd(
    usual_plane: ControlPlane, chart: Path, settings: Settings, tmp_path: Path, autoscaler: str
) -> None:
    add_node(usual_plane, "l4", {L4: "nvidia-l4"}, "", {"nvidia.com/gpu": "4"})
    release = Release(usual_plane, chart, "crowded")
    hardware = {NAME: {**FLEET["hardware"][NAME], "scaling": {"minimum": 1}}}
    classes = {NAME: {"accelerator": "nvidia-l4"}}
    with ExitStack() as stack:
        stack.enter_context(Kubelets(usual_plane))
        release.upgrade({**FLEET, "hardware": hardware}, {"cloud": "gke", "autoscaler": autoscaler, "classes": classes})
        router = stack.enter_context(router_process(settings, options=["--starts", NAME]))
        if autoscaler == "hpa":
            metered(release, "worker-gpu-realtime", NAME)
            stack.enter_context(_adapter(release, router.http))
        else:
            stack.enter_context(operated(release, tmp_path, router.http))
        machines = Machines(release, settings)
        thread = threading.Thread(target=machines.run)
        thread.start()
        for end in (machines.kill, thread.join, machines.over.set):
            stack.callback(end)
        watch = stack.enter_context(Watch(release, router.http, least=int(autoscaler == "hpa")))
        client = stack.enter_context(Client(settings.broker))
        assert until(lambda: wish_of(router.http) is not None, timeout=60)
        for pause in PAUSES:
            time.sleep(pause)
            jobs = [client.submit("paced", str(number), deadline=IMPATIENCE) for number in range(SURGE)]
            assert [job.result(timeout=DEADLINE).outputs["payload"] for job in jobs] == list(map(str, range(SURGE)))
            assert until(lambda: watch.agrees() and ready(release.of_class(NAME)) <= 1, timeout=120)
    say(f"flash crowd, {autoscaler}", watch.late())


@contextmanager
def _adapter(release: Release, router: str) -> Iterator[None]:
    """Serves the router's wish as an external metric, as fresh as KEDA's least polling interval has it: a second."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(1.0):
            if (wish := wish_of(router)) is not None:
                measure(release, wish)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

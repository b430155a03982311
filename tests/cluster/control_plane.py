"""A Kubernetes control plane on the loopback: real etcd, kube-apiserver, controller manager and scheduler."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from local.embedded import free_port
from tests import waiting

TIMEOUT = 120.0
"""Seconds for the API server to get ready on a busy machine; 7 to 16 on an idle one."""

API = {
    "Node": "/api/v1/nodes",
    "Namespace": "/api/v1/namespaces",
    "Pod": "/api/v1/pods",
    "Deployment": "/apis/apps/v1/deployments",
}


until = partial(waiting.until, timeout=30.0, every=0.15)
"""Waits for a condition; each look costs the API server some work."""


class ControlPlane:
    """The processes, and an HTTP client of their API server."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self.folder, self.binaries = folder, binaries
        self.kubeconfig = folder / "kubeconfig"
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> ControlPlane:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._stop()

    def _start(self) -> None:
        client, peer, api = free_port(), free_port(), free_port()
        self.url, self.token = f"https://127.0.0.1:{api}", secrets.token_hex(16)
        key = self.folder / "key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        tokens = self.folder / "tokens"
        tokens.write_text(f"{self.token},admin,admin,system:masters\n")
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.url, "insecure-skip-tls-verify": True}}],
            "users": [{"name": "admin", "user": {"token": self.token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "admin"}}],
            "current-context": "c",
        }
        self.kubeconfig.write_text(json.dumps(config))
        self.http = httpx.Client(
            base_url=self.url, verify=False, headers={"Authorization": f"Bearer {self.token}"}, timeout=30
        )
        store, beside = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
        self._run(
            "etcd", f"--data-dir={self.folder}/etcd", "--unsafe-no-fsync", f"--listen-client-urls={store}",
            f"--advertise-client-urls={store}", f"--listen-peer-urls={beside}",
            f"--initial-advertise-peer-urls={beside}", f"--initial-cluster=default={beside}",
        )  # fmt: skip
        self._run(
            "kube-apiserver", f"--etcd-servers={store}", "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
            f"--secure-port={api}", f"--cert-dir={self.folder}/certs", f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC", "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-signing-key-file={key}",
            f"--service-account-key-file={key}", "--enable-admission-plugins=NodeRestriction",
        )  # fmt: skip
        self._wait()
        quiet = (f"--kubeconfig={self.kubeconfig}", "--port=0", "--secure-port=0", "--leader-elect=false")
        self._run(
            "kube-controller-manager", *quiet, "--use-service-account-credentials=false",
            f"--service-account-private-key-file={key}", "--horizontal-pod-autoscaler-sync-period=2s",
            "--node-monitor-grace-period=10h",
        )  # fmt: skip
        self._run("kube-scheduler", *quiet)

    def _run(self, name: str, *options: str) -> None:
        program = self.binaries / name
        command = [str(program) if program.exists() else name, *options]
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            )

    def _wait(self) -> None:
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end and self._processes[-1].poll() is None:
            try:
                if self.http.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            time.sleep(0.2)
        log = (self.folder / "kube-apiserver.log").read_text()
        raise TimeoutError(f"the API server is not ready: {log[-800:]}")

    def _stop(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def items(self, path: str, **selected: str) -> list[Any]:
        """What is under an API path, by label: `items("/api/v1/pods", labelSelector="a=b")`."""
        answer = self.http.get(path, params=selected)
        answer.raise_for_status()
        return answer.json()["items"]

    def get(self, path: str) -> Any:
        """One object, or None."""
        answer = self.http.get(path)
        return None if answer.status_code == 404 else answer.raise_for_status().json()

    def create(self, path: str, body: Mapping[str, Any]) -> Any:
        """Create an object under a collection's path."""
        answer = self.http.post(path, json=body)
        assert answer.status_code < 300, answer.text
        return answer.json()

    def patch(self, path: str, body: Mapping[str, Any]) -> Any:
        """Merge into an object."""
        answer = self.http.patch(
            path, content=json.dumps(body), headers={"Content-Type": "application/merge-patch+json"}
        )
        assert answer.status_code < 300, answer.text
        return answer.json()

    def tool(self, name: str, *arguments: str, stdin: str | None = None, fails: bool = False) -> str:
        """What helm or kubectl prints; with `fails`, what it complains of."""
        environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig), "HOME": str(self.folder)}
        done = subprocess.run(
            [str(self.binaries / name), *arguments], input=stdin, env=environment, capture_output=True, text=True,
            check=False, timeout=120,
        )  # fmt: skip
        assert (done.returncode != 0) == fails, f"{name} {' '.join(arguments)}: {done.stderr}"
        return done.stderr if fails else done.stdout


class Kubelets(waiting.Watcher):
    """Stands in for the kubelets of made-up nodes: bound pods run and are ready, ended ones go after `stop` seconds.

    Pods whose image is in `broken` never get ready. Those that run once succeed, after what `programs` starts for their
    container.
    """

    def __init__(self, plane: ControlPlane) -> None:
        super().__init__()
        self._plane = plane
        self.broken: set[str] = set()
        self.programs: dict[str, Callable[[], subprocess.Popen[bytes]]] = {}
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def watch(self) -> None:
        while not self.over.wait(0.25):
            try:
                for pod in self._plane.items(API["Pod"]):
                    self._attend(pod)
            except httpx.HTTPError:
                continue

    def _attend(self, pod: Mapping[str, Any]) -> None:
        place = pod["metadata"]
        path = f"/api/v1/namespaces/{place['namespace']}/pods/{place['name']}"
        if place.get("deletionTimestamp"):
            self._plane.http.request("DELETE", path, json={"gracePeriodSeconds": 0})
        elif pod["spec"].get("nodeName") and pod["status"].get("phase") == "Pending":
            if pod["spec"]["restartPolicy"] == "Never":
                if self._has_run(pod):
                    self._plane.patch(f"{path}/status", {"status": {"phase": "Succeeded"}})
                return
            ready = not any(one["image"] in self.broken for one in pod["spec"]["containers"])
            self._plane.patch(f"{path}/status", {"status": running(pod["spec"], ready=ready)})

    def _has_run(self, pod: Mapping[str, Any]) -> bool:
        name, uid = pod["spec"]["containers"][0]["name"], pod["metadata"]["uid"]
        if name in self.programs and uid not in self._started:
            self._started[uid] = self.programs[name]()
        return uid not in self._started or self._started[uid].poll() == 0


def running(spec: Mapping[str, Any], *, ready: bool) -> Mapping[str, Any]:
    """The status of a pod whose containers run."""
    true, said = "True", str(ready)
    conditions = {"Initialized": true, "PodScheduled": true, "ContainersReady": said, "Ready": said}
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {
        "phase": "Running",
        "conditions": [{"type": kind, "status": one, "lastTransitionTime": now} for kind, one in conditions.items()],
        "containerStatuses": [
            {
                "name": one["name"], "ready": ready, "restartCount": 0, "image": one["image"], "imageID": "made-up",
                "state": {"running": {"startedAt": now}},
            }
            for one in spec["containers"]
        ],
    }  # fmt: skip


def add_node(
    plane: ControlPlane, name: str, labels: Mapping[str, str], taint: str = "", devices: Mapping[str, str] | None = None
) -> None:
    """A node that takes pods; `taint` is `key=value`, and keeps others out."""
    key, _, value = taint.partition("=")
    taints = [{"key": key, "value": value, "effect": "NoSchedule"}] if taint else []
    plane.create(
        API["Node"],
        {
            "metadata": {
                "name": name,
                "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **labels},
            },
            "spec": {"taints": taints},
        },
    )
    amounts = {"cpu": "64", "memory": "512Gi", "pods": "110", "ephemeral-storage": "1000Gi", **(devices or {})}
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "made up"}
    plane.patch(
        f"{API['Node']}/{name}/status", {"status": {"capacity": amounts, "allocatable": amounts, "conditions": [ready]}}
    )
    # The controller taints nodes that are not ready when they are created.
    plane.patch(f"{API['Node']}/{name}", {"spec": {"taints": taints}})

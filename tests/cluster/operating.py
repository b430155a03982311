"""The operator as a process under its own service account, and a stand-in for the routers' answers."""

from __future__ import annotations

import base64
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.settings import TREE
from tests.cluster.chart import Release
from tests.cluster.control_plane import until


class Wishes:
    """Answers like a router: how many devices a class should have, and what each device holds."""

    def __init__(self) -> None:
        self.wanted: dict[str, int] = {}
        self.devices: list[dict[str, Any]] = []
        wishes = self

        class Door(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the name is http.server's
                name = self.path.split("/")[3]
                self._say({"replicas": wishes.wanted.get(name, 0), "reason": f"{name} was asked for"})

            def do_GET(self) -> None:
                self._say({"devices": wishes.devices})

            def _say(self, answer: Any) -> None:
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: the test's output is no access log."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door)
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
            self._process = subprocess.Popen(
                [sys.executable, "-m", "controller"], env=environment, stdout=log, stderr=log
            )

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
    """The operator at work on a fleet whose HardwareClasses ask `router`."""
    path = f"/apis/taxiway.dev/v1alpha1/namespaces/{release.namespace}/hardwareclasses"
    for one in release.plane.items(path):
        release.plane.patch(f"{path}/{one['metadata']['name']}", {"spec": {"router": router}})
    controller = Controller(release, folder)
    controller.start()
    try:
        yield controller
    finally:
        controller.kill()

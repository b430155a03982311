"""MLServer's real server in a process of its own, from the environment that `make mlserver` builds."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from local.embedded import free_port
from tasks.settings import TREE
from tests.waiting import until

PROGRAM = TREE / "build" / "engines" / "mlserver" / "bin" / "mlserver"

_MODEL = '''
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Double(MLModel):
    """Twice the numbers, and the words in capitals."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        given = {one.name: one for one in payload.inputs}
        words = [word.upper() for word in StringCodec.decode_input(given["word"])]
        outputs = [
            NumpyCodec.encode_output("y", 2 * NumpyCodec.decode_input(given["x"])),
            StringCodec.encode_output("loud", words),
        ]
        return InferenceResponse(model_name=self.name, outputs=outputs)
'''

_SPECS = {
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "word", "datatype": "BYTES", "shape": [-1, 1]},
    ],
    "outputs": [
        {"name": "y", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "loud", "datatype": "BYTES", "shape": [-1, 1]},
    ],
}


@contextmanager
def mlserver(folder: Path, model: str) -> Iterator[str]:
    """The address of a server with one model, as `http://127.0.0.1:…`. Skips without the environment, outside CI."""
    if not PROGRAM.exists():
        if os.environ.get("CI"):
            pytest.fail(f"CI needs MLServer at {PROGRAM}: run make mlserver")
        pytest.skip("MLServer is not installed: make mlserver")
    folder = folder / model
    folder.mkdir()
    ports = {f"{name}_port": free_port() for name in ("http", "grpc", "metrics")}
    settings = {"host": "127.0.0.1", **ports, "parallel_workers": 0, "use_structured_logging": False}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "double.py").write_text(_MODEL)
    described = {"name": model, "implementation": "double.Double", **_SPECS}
    (folder / "model-settings.json").write_text(json.dumps(described))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, "start", "."], cwd=folder, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{ports['http_port']}"
            ready = until(lambda: process.poll() is not None or _serves(url), patience=120)
            assert ready and process.poll() is None, (folder / "log").read_text()
            yield url
        finally:
            process.terminate()
            process.wait(30)


def _serves(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/health/ready", trust_env=False).is_success
    except httpx.TransportError:
        time.sleep(0.1)
        return False

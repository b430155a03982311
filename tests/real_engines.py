"""Engines' real servers, each in a process of an environment of its own: `make mlserver` and `make engines`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from local.children import kill_group, start_child, stop_child
from local.embedded import free_port
from tasks.settings import TREE
from tests.builders import recorded
from tests.waiting import until

VLLM_NAME = "acme/Tiny-Llama"
"""What vLLM calls its model."""


def program(environment: str, name: str, target: str, *, in_ci: bool) -> str:
    """A program of an engine's environment; skips without it, but fails where CI has to have it."""
    path = TREE / "build" / "engines" / environment / "bin" / name
    if path.exists():
        return str(path)
    if in_ci and os.environ.get("CI"):
        pytest.fail(f"expected {environment} at {path.parent}: run make {target}")
    pytest.skip(f"{environment} is not installed: make {target}")


@contextmanager
def serving_process(
    command: Sequence[str], folder: Path, url: str, ready: str, environment: Mapping[str, str]
) -> Iterator[None]:
    """A server in a process, from when its path `ready` answers with 200 until the context ends."""
    with (folder / "log").open("wb") as log:
        process = start_child(command, environment=environment, folder=folder, output=log.fileno(), errors=log.fileno())
        try:
            up = until(lambda: process.poll() is not None or _serves(url + ready), timeout=300)
            assert up and process.poll() is None, (folder / "log").read_text()
            yield
        finally:
            stop_child(process, timeout=60)
            kill_group(process)  # LitServe's processes outlive the one that started them


def _serves(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        time.sleep(0.1)
        return False


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
    """The address of a server with one model, as `http://127.0.0.1:…`."""
    started = program("mlserver", "mlserver", "mlserver", in_ci=True)
    folder = folder / model
    folder.mkdir()
    ports = {f"{name}_port": free_port() for name in ("http", "grpc", "metrics")}
    settings = {"host": "127.0.0.1", **ports, "parallel_workers": 0, "use_structured_logging": False}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "double.py").write_text(_MODEL)
    described = {"name": model, "implementation": "double.Double", **_SPECS}
    (folder / "model-settings.json").write_text(json.dumps(described))
    url = f"http://127.0.0.1:{ports['http_port']}"
    with serving_process([started, "start", "."], folder, url, "/v2/health/ready", os.environ):
        yield url


_CHAT = '''
import sys

import litserve


class Echo(litserve.LitAPI):
    """Says the last message again, word by word."""

    def setup(self, device):
        pass

    def predict(self, request):
        for word in request.messages[-1].content.split():
            yield f"{word} "


if __name__ == "__main__":
    server = litserve.LitServer(Echo(spec=litserve.OpenAISpec()), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
'''


@contextmanager
def litserve(folder: Path) -> Iterator[str]:
    """The address of a server of OpenAI's chats, which lists no models, as `http://127.0.0.1:…`."""
    python = program("litserve", "python", "mlserver", in_ci=True)
    (folder / "echo.py").write_text(_CHAT)
    port = free_port()
    with serving_process([python, "echo.py", str(port)], folder, f"http://127.0.0.1:{port}", "/health", os.environ):
        yield f"http://127.0.0.1:{port}"


_CONTEXT = 512
_SPECIAL = ["<s>", "</s>"]
_TEMPLATE = "{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}assistant: "


@contextmanager
def vllm(folder: Path, slots: int) -> Iterator[str]:
    """The address of a server that schedules by priority, as `http://127.0.0.1:…`."""
    python = program("vllm", "python", "engines", in_ci=False)
    _write_model(folder / "model")
    port = free_port()
    options = {
        "model": folder / "model",
        "served-model-name": VLLM_NAME,
        "load-format": "dummy",  # random weights, the same for one seed
        "max-model-len": _CONTEXT,
        "max-num-seqs": slots,
        "scheduling-policy": "priority",
        "host": "127.0.0.1",
        "port": port,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *words, "--enforce-eager"]
    with serving_process(command, folder, f"http://127.0.0.1:{port}", "/health", os.environ | quiet):
        yield f"http://127.0.0.1:{port}"


def _write_model(folder: Path) -> None:
    """A Llama of two layers whose tokens are bytes."""
    folder.mkdir()
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate([*letters, *_SPECIAL])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), Decoder()
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    begin, end = _SPECIAL
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"chat_template": _TEMPLATE}))
    (folder / "config.json").write_text(recorded("documents/llama.json"))

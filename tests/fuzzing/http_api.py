"""Asks a router whatever its OpenAPI document allows, and much that it does not, for some minutes.

`python -m tests.fuzzing.http_api` starts a broker, a router with keys and a worker, installs schemathesis into a
virtual environment of its own, and fails where an answer is a 500, or one that the document does not have. Answers that
the fleet is too busy or late (503, 504) are documented, and no failures.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import openai

import taxiway
from api.access import SCOPES
from benchmarks.suite.installing import environment
from tasks.settings import cache_directory
from tests.builders import add_engine_models, recorded
from tests.engine import Engine, serving
from tests.fuzzing.session import a_store, options
from tests.keyring import keys_in, secret_of
from tests.routing import RouterProcess, router_process
from tests.working import worker_process

SCHEMATHESIS = "schemathesis==4.32.5"

QUEUES = recorded("fleets/fuzzed.yaml")

CONFIGURATION = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "4xx", 503, 504]
"""

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,ignored_auth"


def main() -> int:
    """Run; 1 where schemathesis found something, the router logged an error, or it ended."""
    given = options("http_api", __doc__, seconds=300)
    python = environment(cache_directory(os.environ) / "fuzzing", [SCHEMATHESIS])
    secret = secret_of("fuzz")
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "router.log"
        (folder / "schemathesis.toml").write_text(CONFIGURATION)
        with _fleet(folder, log) as router:
            command = [python, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "run"]
            command += [f"{router.http}/schema/openapi.json", "--header", f"Authorization: Bearer {secret}"]
            command += ["--max-time", str(given.seconds), "--seed", str(given.seed), "--checks", CHECKS]
            command += ["--continue-on-failure", "--suppress-health-check", "all", "--request-timeout", "30"]
            hooks = {"SCHEMATHESIS_HOOKS": "fuzzing_hooks", "PYTHONPATH": str(Path(__file__).parent)}
            hooks |= {"FUZZING_JOBS": " ".join(_jobs(router.http, secret))}
            hooks |= {"FUZZING_OBJECTS": " ".join(_objects(router.http, secret))}
            failed = subprocess.run(command, cwd=folder, env={**os.environ, **hooks}, check=False).returncode != 0
            ended = router.process.poll() is not None
        errors = [line for line in log.read_text().splitlines() if '"level":"error"' in line]
    sys.stdout.write(f"seed {given.seed}; errors in the router's log: {len(errors)}\n" + "\n".join(errors[:5]))
    return int(failed or ended or bool(errors))


@contextmanager
def _fleet(folder: Path, log: Path) -> Iterator[RouterProcess]:
    """A router that knows one key for everything, before workers that echo, and ask a scripted engine."""
    engine = Engine()
    shutil.copytree(Path(__file__).parents[2] / "models" / "echo", folder / "models" / "echo")
    add_engine_models(folder / "models", "talk", "tale", "vector")
    keys = keys_in(folder / "keys", fuzz=SCOPES)
    with a_store(folder) as base, log.open("wb") as logged, serving(engine):
        settings = replace(base, models=folder / "models", queues=folder / "queues.yaml")
        settings.queues.write_text(QUEUES.replace("URL", engine.url))
        flags = [*keys, "--files", str(folder / "files"), "--log", "WARNING"]
        with (
            router_process(settings, logged, flags) as router,
            worker_process(settings, "--device", "cpu:0", log=subprocess.DEVNULL),
            worker_process(settings, "--class", "engine.chat", log=subprocess.DEVNULL),
        ):
            yield router


def _objects(http: str, secret: str) -> list[str]:
    """Objects of OpenAI's API to ask for, each as the path parameter and its id."""
    with openai.OpenAI(base_url=f"{http}/v1", api_key=secret, timeout=30) as client:
        line = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"model": "vector", "input": "a"}}
        file = client.files.create(file=("lines.jsonl", json.dumps(line).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        response = client.responses.create(model="talk", input="a", background=True)
    return [f"file={file.id}", f"batch={batch.id}", f"response={response.id}"]


def _jobs(http: str, secret: str) -> list[str]:
    """Jobs to ask for: answered ones, one that failed to come in time, and one that was cancelled."""
    with taxiway.Client(http, key=secret) as client:
        jobs = [client.submit("echo", text) for text in ("a", "b", "long" * 8000)]
        jobs += [client.submit("echo", "late", deadline=1e-3), client.submit("echo", "unwanted")]
        jobs[-1].cancel()
        for job in jobs:
            with suppress(taxiway.TaxiwayError):
                job.result(timeout=60)
        return [job.id for job in jobs]


if __name__ == "__main__":
    sys.exit(main())

"""Dockerfiles and compose.yaml: clean to their checkers, safe as they stand, and with health checks that are true."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from broker.accounts import ACCOUNTS, valkey_accounts
from local.artefacts import llama_files
from local.embedded import EmbeddedValkey, find_binary
from tasks.heartbeat import GONE_AFTER, HEARTBEAT
from tasks.settings import TREE, settings_from
from tasks.topology import load_topology
from tests.waiting import in_thread, until
from tests.working import worker_settings
from workers.heartbeat import HUNG

DOCKER = TREE / "docker"
COMPOSE = DOCKER / "compose.yaml"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"), key=lambda path: path.name)
SECRETS = {
    "VALKEY_PASSWORD": "0123456789abcdef",
    "TAXIWAY_SECRET": "ab" * 32,
    "FLOWER_BASIC_AUTH": "operator:secret",
    "FLOWER_VALKEY_PASSWORD": "fedcba9876543210",
    "TUNER_VALKEY_PASSWORD": "76543210fedcba98",
}

each_image = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


def tool(name: str) -> str:
    """A checker that the development group installs beside this Python."""
    return str(Path(sys.executable).parent / name)


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    return subprocess.run(
        command, cwd=TREE, env={**inherited, **variables}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def compose() -> list[str]:
    """The command of whichever Docker Compose this machine has."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if shutil.which("docker") and run("docker", "compose", "version").returncode == 0:
        return ["docker", "compose"]
    if os.environ.get("CI"):
        pytest.fail("no Docker Compose here: in CI compose.yaml must be checked")
    pytest.skip("no Docker Compose here (Debian: apt-get install docker-compose)")


@pytest.fixture(scope="module")
def services(compose: list[str]) -> Any:
    """Every service of compose.yaml as Compose reads it, all profiles included."""
    return resolved(compose)["services"]


def resolved(compose: list[str]) -> Any:
    """compose.yaml as Compose reads it, all profiles included."""
    done = run(*compose, "--file", str(COMPOSE), "--profile", "*", "config", "--format", "json", **SECRETS)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "compose.yaml is read without a warning"
    return json.loads(done.stdout)


def final_stage(dockerfile: Path) -> list[str]:
    """The instructions of the image that is shipped, one a line."""
    lines = dockerfile.read_text().replace("\\\n", " ").splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("FROM "))
    return lines[last:]


def instruction(dockerfile: Path, name: str) -> str:
    [found] = [line for line in final_stage(dockerfile) if line.startswith(f"{name} ")]
    return found.removeprefix(f"{name} ").strip()


@each_image
def test_an_image_runs_one_process_that_is_not_root_says_when_it_is_healthy_and_was_imported(dockerfile: Path) -> None:
    stage = final_stage(dockerfile)
    steps = [line for line in stage if line.startswith(("RUN ", "COPY "))]

    assert json.loads(instruction(dockerfile, "ENTRYPOINT"))[0] in ("python", "celery")  # it gets the signals
    assert int(instruction(dockerfile, "USER").partition(":")[0]) > 0
    assert "HEALTHCHECK" in "\n".join(stage)
    assert steps[-1].startswith('RUN python -c "import ')
    assert "# syntax=" not in dockerfile.read_text(), "it needs a frontend from elsewhere"
    done = run(tool("hadolint"), str(dockerfile))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@each_image
def test_what_an_image_copies_is_in_the_build_context(dockerfile: Path) -> None:
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile.read_text(), re.MULTILINE)
    copied = [path for paths in copies for path in paths.split()]
    allowed = {line.removeprefix("!") for line in (TREE / ".dockerignore").read_text().splitlines() if line[:1] == "!"}

    assert copied
    for path in copied:
        assert (TREE / path).exists()
        assert any(part.match(pattern) for part in (Path(path), *Path(path).parents) for pattern in allowed), (
            f".dockerignore keeps {path} out"
        )


def test_images_of_others_are_pinned_by_digest_and_to_one_each() -> None:
    texts = [path.read_text() for path in (*DOCKERFILES, COMPOSE)]
    asked = [line.split()[1] for text in texts for line in text.splitlines() if line.startswith("FROM ")]
    asked += re.findall(r"^ +image: (?!taxiway/)(\S+)", COMPOSE.read_text(), re.MULTILINE)
    pinned = run_path(str(DOCKER / "release.py"))["PINNED"]
    defaults = re.findall(r"(?:ARG |\$\{)([A-Z]+_IMAGE)(?:=|:-)(\S+?)\}?$", "\n".join(texts), re.MULTILINE)

    assert {re.sub(r":-.*", "}", image) for image in asked} == {f"${{{name}}}" for name, _ in defaults}
    assert all(pinned.fullmatch(image) for _, image in defaults), defaults
    assert len(set(defaults)) == len(dict(defaults)) == 5


def test_models_reach_running_containers_by_their_folder(services: dict[str, Any]) -> None:
    for name, service in services.items():
        if name in ("router", "tuner") or name.startswith("worker-"):
            mounts = {one["target"]: one for one in service["volumes"]}
            assert mounts["/app/models"]["type"] == "bind", name
            assert mounts["/app/models"]["read_only"], name


def test_compose_yaml_keeps_to_the_compose_specification() -> None:
    done = run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("missing", sorted(SECRETS))
def test_compose_starts_nothing_without_its_secrets(compose: list[str], missing: str) -> None:
    given = {name: value for name, value in SECRETS.items() if name != missing}

    done = run(*compose, "--file", str(COMPOSE), "config", "--quiet", **given)

    assert done.returncode != 0
    assert missing in done.stderr


def test_one_command_makes_all_secrets_and_no_second_time(tmp_path: Path) -> None:
    shutil.copy(TREE / "Makefile", tmp_path)
    (tmp_path / "docker").mkdir()
    shutil.copy(DOCKER / ".env.example", tmp_path / "docker")
    run("make", "-C", str(tmp_path), "docker/.env")
    made = tmp_path / "docker" / ".env"
    values = dict(line.split("=", 1) for line in made.read_text().splitlines() if line and not line.startswith("#"))

    assert {name: len(values[name]) for name in SECRETS} == dict.fromkeys(SECRETS, 64) | {"FLOWER_BASIC_AUTH": 73}
    assert made.stat().st_mode & 0o077 == 0
    before = made.read_text()
    (tmp_path / "docker" / ".env.example").touch()
    run("make", "-C", str(tmp_path), "docker/.env")
    assert made.read_text() == before


def test_ports_are_open_on_the_loopback_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]

    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    assert "ports" not in services["valkey"]


@pytest.mark.parametrize(("name", "variable"), [("flower", "CELERY_BROKER_URL"), ("tuner", "TAXIWAY_BROKER")])
def test_flower_and_the_tuner_have_accounts_with_no_more_rights_than_they_need(
    compose: list[str], name: str, variable: str
) -> None:
    password = SECRETS[f"{name.upper()}_VALKEY_PASSWORD"]
    answer = resolved(compose)
    lines = answer["configs"]["valkey"]["content"].splitlines()
    [line] = [line for line in lines if line.startswith(f"user {name} ")]
    [rules] = [
        line
        for line in valkey_accounts([], dict.fromkeys(ACCOUNTS, password)).splitlines()
        if line.startswith(f"user {name} ")
    ]

    assert line.split()[:4] == ["user", name, "on", f">{password}"]
    assert line.split()[4:] == rules.split()[4:]
    assert f"redis://{name}:" in answer["services"][name]["environment"][variable]


def test_the_tuner_runs_from_the_routers_image_and_gets_no_signing_key(services: dict[str, Any]) -> None:
    tuner = services["tuner"]
    assert tuner["image"] == services["router"]["image"]
    assert tuner["entrypoint"] == ["python", "-m", "simulator.tuning.command"]
    assert "TAXIWAY_SECRET" not in tuner["environment"]


def test_flower_is_reached_through_an_interface_that_closes_what_flower_leaves_open(compose: list[str]) -> None:
    answer = resolved(compose)

    assert "ports" not in answer["services"]["flower"]
    configuration = answer["configs"]["flower-proxy"]["content"].replace("$$", "$")  # Compose writes it as it reads it
    assert "location ~ ^/(metrics|healthcheck)/?$ { return 404; }" in configuration


def test_every_hardware_class_whose_engine_taxiway_up_does_not_start_has_a_worker(services: dict[str, Any]) -> None:
    commands = [service["command"] for name, service in services.items() if name.startswith("worker-")]
    classes = {command[command.index("--class") + 1]: command[command.index("--device") + 1] for command in commands}
    topology = load_topology(TREE / "queues.yaml")
    started = llama_files(topology).keys()
    hardware = {name: one for name, one in topology.hardware.items() if name not in started}

    assert classes.keys() == hardware.keys()
    assert {name: device.partition(":")[0] for name, device in classes.items()} == {
        name: wanted.device for name, wanted in hardware.items()
    }


def test_what_few_need_joins_by_profile(services: dict[str, Any]) -> None:
    profiles = {name: service.get("profiles", []) for name, service in services.items()}

    assert profiles.pop("worker-cuda") == ["cuda"]
    assert profiles.pop("worker-tpu") == ["tpu"]
    assert profiles.pop("prometheus") == profiles.pop("grafana") == ["monitoring"]
    assert not any(profiles.values())


def test_a_service_is_bounded_cannot_gain_privileges_and_ours_write_in_their_volumes_alone(
    services: dict[str, Any],
) -> None:
    for name, service in services.items():
        assert int(service["mem_limit"]) <= 2**34, name
        assert service["pids_limit"] <= 1024, name
        assert not service["image"].startswith("taxiway/") or service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.fixture(scope="module")
def compose_valkey(compose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    """A real server on compose.yaml's own configuration, but for its directory and a socket in place of a port."""
    folder = tmp_path_factory.mktemp("compose-valkey")
    configuration = folder / "valkey.conf"
    configuration.write_text(resolved(compose)["configs"]["valkey"]["content"])
    place = ["--dir", str(folder), "--port", "0", "--unixsocket", str(folder / "valkey.sock")]
    with subprocess.Popen([str(find_binary()), str(configuration), *place], stdout=subprocess.DEVNULL) as server:
        patient = Retry(ConstantBackoff(0.05), 200)
        socket_path = str(folder / "valkey.sock")
        try:
            with redis.Redis(
                unix_socket_path=socket_path, password=SECRETS["VALKEY_PASSWORD"], retry=patient
            ) as client:
                client.ping()
                yield client
        finally:
            server.terminate()


def test_composes_valkey_keeps_messages_never_drops_one_and_asks_for_a_password(compose_valkey: redis.Redis) -> None:
    settings = compose_valkey.config_get("append*", "maxmemory-policy")

    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] == "everysec"
    assert settings["maxmemory-policy"] == "noeviction"
    path = compose_valkey.connection_pool.connection_kwargs["path"]
    with (
        redis.Redis(unix_socket_path=path, retry=Retry(ConstantBackoff(0), 0)) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()


def check_worker(alive: Path) -> int:
    return run("sh", str(DOCKER / "check_worker.sh"), TAXIWAY_ALIVE=str(alive)).returncode


def test_a_worker_is_healthy_while_it_touches_its_file_and_not_before_or_after(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    before = check_worker(alive)
    alive.touch()
    while_it_beats = check_worker(alive)
    os.utime(alive, (0, time.time() - GONE_AFTER - 1))
    after = check_worker(alive)

    assert (before, while_it_beats, after) == (1, 0, 1)


IMPATIENT = "from workers import heartbeat; heartbeat.UNREACHED = 5.0; from workers.__main__ import main; main()"
"""A worker as it is, but that it waits less long for the store's answer."""


def test_a_worker_touches_its_file_while_the_store_answers_and_ends_when_it_has_not_for_long(tmp_path: Path) -> None:
    alive, log = tmp_path / "alive", tmp_path / "log"
    with EmbeddedValkey(tmp_path / "store") as server:
        variables = {"TAXIWAY_BROKER": server.url, "TAXIWAY_SECRET": "00" * 32}
        settings = worker_settings(settings_from(variables), tmp_path)
        environment = {**os.environ, **settings.environment(), "TAXIWAY_ALIVE": str(alive), "PYTHONPATH": str(TREE)}
        command = [sys.executable, "-c", IMPATIENT, "--class", "cpu.batch"]
        with log.open("wb") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as worker:
            try:
                assert until(alive.exists)
                first = alive.stat().st_mtime_ns
                assert until(lambda: alive.stat().st_mtime_ns > first)
                server.stop()
                stopped = time.time()
                assert worker.wait(60) == HUNG, log.read_text()
                assert alive.stat().st_mtime < stopped + HEARTBEAT
            finally:
                worker.kill()
    assert "state store unreachable; worker exits" in log.read_text()


def test_a_process_in_which_no_thread_gets_to_run_is_ended_with_its_traceback() -> None:
    # PyDLL keeps the GIL while it sleeps.
    code = "import ctypes; from workers import heartbeat; heartbeat.expect_life(0.5); ctypes.PyDLL(None).sleep(60)"
    done = run(sys.executable, "-c", code, PYTHONPATH=str(TREE))
    assert done.returncode == 1
    assert 'File "<string>", line 1' in done.stderr


class Answers(http.server.BaseHTTPRequestHandler):
    """Healthy at /healthy, 503 anywhere else."""

    def do_GET(self) -> None:  # the name is http.server's
        self.send_response(200 if self.path == "/healthy" else 503)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test's output is no access log."""


def test_a_server_is_healthy_while_it_answers_with_success() -> None:
    def check(path: str) -> int:
        script = str(DOCKER / "check_http.py")
        return run(sys.executable, "-I", "-S", script, str(server.server_port), path).returncode

    with (
        http.server.HTTPServer(("127.0.0.1", 0), Answers) as server,
        in_thread(server.serve_forever, stop=server.shutdown),
    ):
        answered = check("/healthy"), check("/elsewhere")
    assert (*answered, check("/healthy")) == (0, 1, 1)

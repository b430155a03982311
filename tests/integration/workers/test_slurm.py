"""A worker as a pilot job under Slurm, which ends it by its walltime."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from local.embedded import free_port
from tasks.settings import TREE, Settings
from tests.builders import recorded
from tests.waiting import until
from tests.working import CLASS, LASTING, QUEUES, Tower, is_running, release, worker_settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("slurmctld"), reason="needs Slurm: apt-get install slurm-wlm"),
]

CONFIGURATION = recorded("documents/slurm.conf")


def run(*command: str, environment: Mapping[str, str]) -> str:
    done = subprocess.run(command, env=environment, cwd=TREE, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Mapping[str, str]]:
    """A Slurm of one node on this machine: the environment of its commands."""
    folder = tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    (folder / "spool").mkdir()
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(host=host, folder=folder, ports=(free_port(), free_port()), cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
    files |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
    munge = ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items())]
    with ExitStack() as stack:
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
            log = stack.enter_context((folder / f"{command[0]}.out").open("wb"))
            child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(stop, child)
            if command is munge:
                until((folder / "munge.socket").exists)
        assert until(lambda: "idle" in run("sinfo", "--noheader", "--format=%t", environment=environment))
        yield environment
        run("scancel", "--full", "--signal=KILL", "--partition=all", environment=environment)
        assert until(lambda: not run("squeue", "--noheader", environment=environment))  # else its step outlives slurmd


def stop(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGTERM)
    child.wait(30)


def test_a_pilot_drains_before_its_walltime_ends_and_its_job_runs_in_the_next_one(
    slurm: Mapping[str, str], settings: Settings, tmp_path: Path
) -> None:
    fleet = worker_settings(settings, tmp_path, QUEUES.replace("    warm: ", "    notice: {grace: 5}\n    warm: "))
    environment = {**slurm, **fleet.environment(), "TAXIWAY_CLASS": CLASS, "TAXIWAY_PYTHON": sys.executable}
    script = str(TREE / "examples" / "slurm" / "worker.sbatch")
    options = (
        "--parsable",
        "--chdir",
        str(TREE),
        "--cpus-per-task=1",
        "--signal=B:USR2@50",
        "--output",
        f"{tmp_path}/%j",
    )

    def submit(minutes: int) -> str:
        return run("sbatch", *options, f"--time={minutes}", script, environment=environment).strip()

    def state(pilot: str) -> str:
        return run("scontrol", "show", "job", pilot, environment=environment)

    with Tower(fleet) as tower:
        pilot = submit(1)
        job = tower.order("slab", LASTING)
        assert until(lambda: is_running(tower, job))
        drained = until(lambda: "JobState=COMPLETED" in state(pilot), timeout=120)  # not TIMEOUT: it ended by itself
        assert drained, (state(pilot), (tmp_path / pilot).read_text())

        last = submit(5)
        assert until(lambda: is_running(tower, job))
        release(fleet)
        tower.result(job)
        run("scancel", last, environment=environment)
        assert until(lambda: "JobState=CANCELLED" in state(last))

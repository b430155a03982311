"""Do placements keep what they state, on a machine that is busy on purpose? Both drills start a fleet of their own.

`python -m lab.drills.estimates newcomer` spins processes beside a fresh fleet that has learned nothing, and
submits generations one after the other. Each answer is held against its placement's "at most": the share that held, and
how many times the actual seconds the median bound was. A job that expired before its bound counts for neither.

`python -m lab.drills.estimates engine` serves SmolLM2 by llama.cpp, as an endpoint whose engine the fleet
starts, on the cores that two CPU workers have, too. While bulk chats wait for the engine, live sentiment requests come.
The figures are the share of them that was accepted, and of the accepted the share that was answered in time.

`python FILE engine` does so with the tree that PYTHONPATH names.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import taxiway
from benchmarks.harness.measure import answer, percentile, say
from benchmarks.harness.processes import broker_settings, started
from local.embedded import EmbeddedValkey, free_port
from tasks.heartbeat import HEARTBEAT
from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.settings import TREE, cache_directory
from tasks.web import ask
from taxiway.errors import OverloadedError, TaxiwayError

HELD, TIMES = 0.95, 3.0
"""Targets: the least share of bounds that hold, and the most that the median bound is, as a multiple of the actual."""

ACCEPTED, IN_TIME = 0.95, 0.99
"""Targets of live work beside an engine: the least share that is accepted, and of that the least in time."""

_BOUND = re.compile(r"(?:at most|guaranteed in) ([\d.e+-]+) s")

SPINNER = "import sys, time\nend = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: pass"

SPUN = 600.0
"""Seconds after which a spinning process ends by itself."""

FRESH = [
    ["--class", "gpu.realtime", "--device", "cuda:0", "--emulate"],
    *(["--class", "cpu.batch", "--device", f"cpu:{number}"] for number in range(2)),
]

SHARED = """\
hardware:
  cpu.batch: {{device: cpu, runtimes: [onnx], max_batch: 16, max_wait: 0.005, price: {{usd_per_hour: 0.05}},
    warm: [sentiment], labels: [cpu]}}
  engine:
    device: endpoint
    endpoint:
      protocol: openai
      url: http://127.0.0.1:{port}/v1
      slots: {slots}
      models: {{chat: smollm2}}
      start: {{command: "{python} {file} serve {gguf} {slots} {port}", ready: "http://127.0.0.1:{port}/health"}}
    price: {{usd_per_hour: 0.05}}
    labels: [engine]
    horizon: 60
service:
  live: {{deadline: 0.25, priority: high}}
  bulk: {{deadline: 3600, priority: low}}
default_service: live
"""

TEXT = "The crew was kind and the landing smooth."


def main() -> int:
    """Measure, and print JSON lines; the exit status."""
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:5])
    parser = argparse.ArgumentParser(prog="python -m lab.drills.estimates", description=__doc__)
    parser.add_argument("drill", choices=("newcomer", "engine"))
    parser.add_argument("--spinners", type=int, default=6, help="busy processes beside a newcomer's fleet")
    parser.add_argument("--rounds", type=int, default=3, help="fleets, each of them fresh")
    parser.add_argument("--bulk", type=int, default=40, help="chats that wait for the engine")
    parser.add_argument("--seconds", type=float, default=40, help="for which live requests come, ten a second")
    given = parser.parse_args()
    if given.drill == "newcomer":
        return _newcomer(given.rounds, given.spinners)
    return _engine(given.rounds, given.bulk, given.seconds)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one job: what its placement stated as "at most", the seconds it took, and whether it expired."""

    bound: float
    seconds: float
    expired: bool

    @property
    def known(self) -> bool:
        """Whether its end tells if the bound held."""
        return not self.expired or self.seconds > self.bound


def _newcomer(rounds: int, spinners: int) -> int:
    outcomes = [one for _ in range(rounds) for one in _fresh(spinners)]
    known = [one for one in outcomes if one.known]
    held = sum(not one.expired and one.seconds <= one.bound for one in known) / len(known)
    times = [one.bound / one.seconds for one in known]
    expired = sum(one.expired for one in outcomes)
    load = round(os.getloadavg()[0], 1)
    more = {"jobs": len(outcomes), "expired": expired, "known": len(known), "load": load}
    say(answer("share of 'at most' that held, generations on a fresh and busy fleet", [held], target=HELD, **more))
    say(answer("median bound, as a multiple of the actual seconds", times, at_most=TIMES))
    return 0 if held >= HELD and statistics.median(times) <= TIMES else 1


def _fresh(spinners: int) -> list[Outcome]:
    with tempfile.TemporaryDirectory() as name, spinning(spinners), EmbeddedValkey(Path(name)) as valkey:
        variables = broker_settings(valkey.socket_url, TREE / "queues.yaml").environment()
        engine = ["-m", "local.engine", "--class", "cpu.llama", "--device", "endpoint:0"]
        commands = [*(["-m", "workers", *arguments] for arguments in FRESH), engine]
        router = ["-m", "api", "--host", "127.0.0.1", "--port", "0"]
        with ExitStack() as stack:
            for number, command in enumerate([*commands, router]):
                stack.enter_context(started(command, variables, Path(name) / f"{number}.log"))
            with taxiway.Client(valkey.socket_url) as client:
                return [_submitted(client, f"Name three seabirds {number}.") for number in range(1, 9)]


def _submitted(client: taxiway.Client, text: str) -> Outcome:
    """One generation by the default service, like a newcomer's."""
    job = client.submit("generate", text)
    try:
        job.result(timeout=60)
        expired = False
    except TaxiwayError:
        expired = True
    record = job.status().record
    bound = _bound_in(record.reason)
    seconds = record.finished - record.placed
    note = "expired" if expired else "held" if seconds <= bound else "broken"
    sys.stderr.write(f"{record.hardware_class}/{record.variant} {seconds:.2f} s: {note}: {record.reason}\n")
    return Outcome(bound, seconds, expired)


def _bound_in(reason: str) -> float:
    """What a placement's reason states as "at most"; infinite if nothing."""
    found = _BOUND.search(reason)
    return float(found[1]) if found else math.inf


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many processes that keep a core busy each, for the duration of the block."""
    processes = [subprocess.Popen([sys.executable, "-c", SPINNER, str(SPUN)]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@dataclass(frozen=True, slots=True)
class Live:
    """Live requests: the seconds of those answered and their bounds; how many were refused at once, or not answered."""

    answered: Sequence[float]
    bounds: Sequence[float]
    refused: int
    missed: int

    @property
    def accepted(self) -> int:
        """How many were accepted."""
        return len(self.answered) + self.missed


def _engine(rounds: int, bulk: int, seconds: float) -> int:
    runs = [_beside(bulk, seconds) for _ in range(rounds)]
    accepted, refused = sum(run.accepted for run in runs), sum(run.refused for run in runs)
    taken = [one for run in runs for one in run.answered]
    in_time = sum(one <= 0.25 for one in taken) / accepted
    load = round(os.getloadavg()[0], 1)
    share = accepted / (accepted + refused)
    say(answer(f"share of live requests accepted beside {bulk} bulk chats", [share], target=ACCEPTED, load=load))
    kept = [second <= bound for run in runs for second, bound in zip(run.answered, run.bounds, strict=True)]
    held = round((sum(kept)) / accepted, 4)
    figures = {
        "held": held,
        "p50": round(percentile(taken, 50), 4),
        "p99": round(percentile(taken, 99), 4),
        "live": accepted,
    }
    say(answer("share of the accepted in time (0.25 s)", [in_time], target=IN_TIME, **figures))
    return 0 if in_time >= IN_TIME and share >= ACCEPTED else 1


def _beside(bulk: int, seconds: float) -> Live:
    gguf = ArtefactStore(cache_directory(os.environ)).path(load_catalogue(TREE / "models").resolve("chat"), "weights")
    with tempfile.TemporaryDirectory() as name, EmbeddedValkey(Path(name)) as valkey:
        queues = Path(name) / "queues.yaml"
        python, file = sys.executable, Path(__file__).resolve()
        queues.write_text(SHARED.format(port=free_port(), slots=4, python=python, file=file, gguf=gguf))
        variables = broker_settings(valkey.socket_url, queues).environment()
        commands = [
            ["-m", "local.engine", "--class", "engine", "--device", "endpoint:0"],
            *(["-m", "workers", "--class", "cpu.batch", "--device", f"cpu:{number}"] for number in range(2)),
            ["-m", "api", "--host", "127.0.0.1", "--port", "0"],
        ]
        with ExitStack() as stack:
            logs = [Path(name) / f"{number}.log" for number in range(len(commands))]
            ready = [stack.enter_context(started(c, variables, log)) for c, log in zip(commands, logs, strict=True)]
            live = asyncio.run(_mixed(valkey.socket_url, bulk, seconds))
            time.sleep(2 * HEARTBEAT)
            shown = json.loads(ask(f"{ready[-1]['http']}/v2/fleet", timeout=5.0) or b"")["classes"]["cpu.batch"]
            sys.stderr.write(f"calibration of cpu.batch: {shown.get('bounds')}\n")
            return live


async def _mixed(broker: str, bulk: int, seconds: float) -> Live:
    """Queue the chats, and send live requests at ten a second, one by one."""
    answered: list[float] = []
    bounds: list[float] = []
    ended = {"refused": 0, "missed": 0}
    async with taxiway.AsyncClient(broker) as client:
        await client.infer("sentiment", TEXT, deadline=30)
        chats = [
            await client.submit("chat", _chat(number), service="bulk", locality="engine") for number in range(bulk)
        ]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.perf_counter()
            try:
                job = await client.submit("sentiment", TEXT, service="live", locality="cpu")
                reason = (await job).report.reason
                answered.append(time.perf_counter() - began)
                bounds.append(_bound_in(reason))
            except OverloadedError:
                ended["refused"] += 1
            except TaxiwayError:
                ended["missed"] += 1
            await asyncio.sleep(0.1)
        done = sum([not (await chat.status()).record.finished for chat in chats])
        sys.stderr.write(f"{done} of {bulk} chats still wait or run; {len(answered)} answered, {ended}\n")
        for chat in chats:
            await chat.cancel()
    return Live(answered, bounds, **ended)


def _chat(number: int) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": f"Tell me of seabird number {number}."}], "max_tokens": 200}


def serve(gguf: str, slots: str, port: str) -> None:
    """Serve the model with llama.cpp on a thread for each core, until standard input ends."""
    from xllamacpp import CommonParams, Server

    parameters = CommonParams()
    parameters.model.path = gguf
    parameters.model_alias = {"smollm2"}
    parameters.n_parallel, parameters.n_ctx, parameters.port = int(slots), 1024 * int(slots), int(port)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = Server(parameters)
    sys.stderr.write(f"{server.listening_address}\n")
    while True:
        time.sleep(60)


if __name__ == "__main__":
    sys.exit(main())

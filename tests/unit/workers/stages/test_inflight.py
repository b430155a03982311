"""Jobs in running batches: a small decoder on the real runtime, behind the worker's own executor."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.valkey.records import Claim, Verdict
from tasks.models.artefacts import ArtefactStore
from tasks.models.catalogue import Catalogue
from tasks.models.folder import load_catalogue
from tasks.models.model import Model
from tasks.models.profiles import ProfileBook
from tasks.topology import Price
from taxiway.contract.job import Piece
from taxiway.errors import ExecutionError, TaxiwayError
from tests.builders import a_class, a_delivery, a_ticket
from tests.decoding import tiny_model
from workers.decide.residency import InUseError
from workers.device import find_device
from workers.executor import Executor
from workers.learned import Loaded
from workers.pipelines.running_batch import MAX_HELD
from workers.stages.admit import gather, prepare
from workers.stages.job import Delivery, Job
from workers.stages.lane import InFlight
from workers.stages.queues import PieceQueue

PRICE = Price(usd_per_hour=1.0)


class Pieces(PieceQueue):
    """Keeps what is put."""

    def __init__(self, kept: list[tuple[str, Piece]]) -> None:
        super().__init__()
        self._kept = kept

    def put(self, pieces: Sequence[tuple[str, Piece]]) -> None:
        self._kept += pieces


class Deck:
    """A device with what is in flight there, and the pieces of answers that it streams."""

    def __init__(self, model: Model, executor: Executor) -> None:
        self.model = model
        self.executor = executor
        self.pieces: list[tuple[str, Piece]] = []
        self.inflight = InFlight(executor, Pieces(self.pieces))
        self.loaded: Loaded = executor.load(model, "onnx")
        assert self.inflight.serve(self.loaded)

    def job(self, *prompts: str, stream: bool = False, blamed: int = 0, **parameters: Any) -> Job:
        """A claimed job whose rows wait."""
        job = Job(
            delivery=self.delivery(blamed),
            hardware=self.executor.hardware,
            model=self.model,
            variant="onnx",
            key=self.loaded.key,
            rows=tuple({"prompt": prompt} for prompt in prompts),
            parameters={"temperature": 0, **parameters},
            outputs=("text",),
            single=len(prompts) == 1,
            arrived=0.0,
            stream=stream,
        )
        prepare(job, self.loaded)
        gather(job)
        return job

    def delivery(self, blamed: int) -> Delivery:
        """A message that is held under its job's second claim."""
        ticket = a_ticket(str(uuid.uuid4()), self.model.id, prices={"cpu.batch": 1.0})
        return a_delivery(ticket, claim=Claim(Verdict.RUN, "worker#2", blamed=blamed))

    def join(self, job: Job) -> Job:
        """Let all the job's rows take part."""
        self.inflight.join(self.loaded.key, [(job, list(range(len(job.items))))])
        return job

    def finish(self) -> list[tuple[Job, TaxiwayError | None]]:
        """Step until nothing is in flight; the jobs in the order in which they ended."""
        ended = []
        while self.inflight.rows:
            ended += self.inflight.step()
        return ended


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder, memory="100MiB")
    return folder


@pytest.fixture
def deck(catalogue: Path) -> Deck:
    hardware = a_class(runtimes=("onnx", "echo"))
    executor = Executor(hardware, find_device(hardware, "cpu:0", emulate=False), store(catalogue), threads=1)
    return Deck(load_catalogue(catalogue).resolve("tiny"), executor)


def store(catalogue: Path) -> ArtefactStore:
    return ArtefactStore(catalogue.parent / "cache")


def test_a_job_ends_with_its_last_row_and_reports_its_times(deck: Deck) -> None:
    job = deck.join(deck.job("one", "two", max_tokens=5))
    alone = deck.join(deck.job("three", max_tokens=2))
    assert [ended for ended, _ in deck.finish()] == [alone, job]
    assert [answer and answer["tokens"] for answer in job.answers] == [5, 5]
    assert job.done
    assert 0 < job.device_time < job.run_time
    assert job.batch in (2, 3)


def test_each_row_of_a_job_is_streamed_as_it_grows_with_the_probabilities_of_its_tokens(deck: Deck) -> None:
    job = deck.join(deck.job("one", "two", stream=True, max_tokens=4, logprobs=1))
    deck.finish()
    for row, answer in enumerate(job.answers):
        assert answer is not None
        told = [piece for _, piece in deck.pieces if piece.row == row]
        assert "".join(piece.text for piece in told) == answer["text"]
        assert [piece.sent for piece in told] == [*range(len(told))]
        tokens = [token for piece in told for delta in piece.beside for token in delta["logprobs"]]
        assert tokens == answer["logprobs"]["content"][: len(tokens)]
        assert len(tokens) > 0


def test_a_job_that_joins_gets_the_answer_that_it_gets_alone(deck: Deck) -> None:
    deck.join(job := deck.job("two", max_tokens=9))
    deck.finish()
    deck.join(deck.job("one", max_tokens=30))
    deck.inflight.step()
    deck.join(other := deck.job("two", max_tokens=9))
    assert deck.finish()[0][0] is other
    assert other.answers == job.answers


def test_room_is_bounded_by_the_class_s_batch_and_by_memory(deck: Deck) -> None:
    key = deck.loaded.key
    assert deck.inflight.room(key, 256) == 4
    deck.join(deck.job("one", "two", max_tokens=3))
    assert deck.inflight.rows == 2
    assert deck.inflight.room(key, 256) == 2
    assert deck.inflight.room(key, MAX_HELD // 2) == 0
    deck.finish()
    assert deck.inflight.room(key, 256) == 4


def test_a_job_that_may_have_ended_a_worker_runs_alone(deck: Deck) -> None:
    key = deck.loaded.key
    deck.join(deck.job("one", max_tokens=3))
    assert deck.inflight.room(key, 256, alone=True) == 0
    deck.finish()
    assert deck.inflight.room(key, 256, alone=True) == 4
    deck.join(deck.job("two", blamed=1, max_tokens=3))
    assert deck.inflight.room(key, 256) == 0
    deck.finish()
    assert deck.inflight.room(key, 256) == 4


def test_a_dropped_job_s_rows_leave_and_nothing_more_of_it_is_streamed(deck: Deck) -> None:
    dropped = deck.join(deck.job("one", stream=True, max_tokens=50))
    other = deck.join(deck.job("two", max_tokens=4))
    while not deck.pieces:
        deck.inflight.step()
    before = len(deck.pieces)
    deck.inflight.drop(dropped)
    assert deck.inflight.jobs() == {other}
    assert [job for job, _ in deck.finish()] == [other]
    assert len(deck.pieces) == before


def test_a_job_whose_row_cannot_run_fails_alone_and_names_the_row(deck: Deck) -> None:
    bad, good = deck.job("one", "two", max_tokens=4), deck.job("three", max_tokens=4)
    bad.items[1].arrays["tokens"][-1] = 10**6  # no token of the vocabulary
    deck.join(good)
    deck.join(bad)
    errors = dict(deck.finish())
    assert errors.keys() == {good, bad}
    assert errors[good] is None and good.done
    error = errors[bad]
    assert isinstance(error, ExecutionError)
    assert error.details["row"] == 1


def test_pieces_are_streamed_only_of_jobs_that_ask_and_make_up_the_answer(deck: Deck) -> None:
    asks, other = deck.job("one", stream=True, max_tokens=60), deck.job("two", max_tokens=60)
    deck.join(asks)
    deck.join(other)
    deck.finish()
    assert {job for job, _ in deck.pieces} == {asks.delivery.job}
    pieces = [piece for _, piece in deck.pieces]
    answer = asks.answers[0]
    assert answer is not None
    assert "".join(piece.text for piece in pieces) == answer["text"]
    assert [piece.at for piece in pieces] == [len("".join(p.text for p in pieces[:n])) for n in range(len(pieces))]
    assert {piece.attempt for piece in pieces} == {2}
    assert len(pieces) > 30


def test_a_variant_in_flight_is_not_unloaded_for_another(deck: Deck, catalogue: Path, tmp_path: Path) -> None:
    hardware = a_class(runtimes=("onnx",), memory=200 * 2**20)
    tiny_model(tmp_path, memory="100MiB")
    text = (tmp_path / "tiny" / "model.yaml").read_text().replace("name: tiny", "name: other", 1)
    (tmp_path / "tiny").rename(tmp_path / "other")
    (tmp_path / "other" / "model.yaml").write_text(text)
    other = load_catalogue(tmp_path).resolve("other")
    small = Deck(deck.model, Executor(hardware, deck.executor.device, store(catalogue), threads=1))
    small.join(small.job("one", max_tokens=3))
    with pytest.raises(InUseError):
        small.executor.load(other, "onnx")
    small.finish()
    assert small.executor.load(other, "onnx").model is other
    assert small.executor.ready(small.model, "onnx") is None
    small.loaded = small.executor.load(small.model, "onnx")
    assert small.inflight.serve(small.loaded)
    small.join(small.job("one", max_tokens=3))
    assert len(small.finish()) == 1


def test_the_device_learns_how_its_running_batches_compare_with_the_profile(deck: Deck) -> None:
    deck.join(deck.job("one", max_tokens=4))
    deck.finish()
    assert deck.executor.track(deck.loaded).batches == 1


def test_what_may_have_more_tokens_than_there_is_time_for_is_late(deck: Deck) -> None:
    long, short = deck.join(deck.job("one", max_tokens=400)), deck.join(deck.job("two", max_tokens=4))
    for _ in range(2):
        deck.inflight.step()
    assert deck.inflight.late(0.0) == {long, short}
    assert deck.inflight.late(3600.0) == set()
    step = long.run_time / 2
    assert deck.inflight.late(20 * step) == {long}


def test_rows_in_flight_run_to_their_end_when_their_model_is_replaced_and_none_joins_them(deck: Deck) -> None:
    deck.join(job := deck.job("one", max_tokens=9))
    deck.finish()
    deck.join(again := deck.job("one", max_tokens=9))
    deck.inflight.step()
    other = msgspec.structs.replace(deck.model, artefacts={})
    executor = deck.executor
    executor.renew(Catalogue({other.id: other}), ProfileBook())
    deck.inflight.retire()
    assert executor.all_loaded() == []
    assert not deck.inflight.serves(deck.loaded.key)
    assert deck.finish() == [(again, None)]
    assert again.answers == job.answers
    executor.sweep()
    assert executor.memory_used() == 0

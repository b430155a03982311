"""The running batch of a generation, over a small decoder on the real runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from taxiway.errors import ExecutionError
from tests.decoding import VOCABULARY, tiny_decoder
from workers.pipelines.running_batch import MAX_HELD, MIN_PREFILL, RunningBatch, RunningRow
from workers.pipelines.sampling import GeneratedText, SamplingParameters
from workers.port import Item
from workers.runtimes.onnx import OnnxDecoder

NO_TOKEN = VOCABULARY + 1


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> OnnxDecoder:
    return tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def batch(decoder: OnnxDecoder) -> Iterator[RunningBatch]:
    empty = decoder.memory()
    running = RunningBatch(decoder, begin, prefill_time=0.0)
    yield running
    running.leave(running.rows)
    assert decoder.memory() == empty


def begin(item: Item) -> GeneratedText:
    sampling = SamplingParameters(item.parameters["most"], temperature=item.parameters.get("temperature", 0.0), seed=5)
    return GeneratedText(sampling, frozenset(), lambda tokens: "".join(chr(65 + token) for token in tokens))


def row(prompt: Sequence[int], most: int, **parameters: float) -> Item:
    return Item({"tokens": np.array(prompt, np.int64)}, len(prompt) + most, {"most": most, **parameters})


def prompt(length: int, seed: int = 0) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()
    return drawn


def finish(batch: RunningBatch) -> list[RunningRow]:
    """Step until all rows have ended; the rows in the order in which they did."""
    ended: list[RunningRow] = []
    for _ in range(1000):
        if not batch.rows:
            return ended
        ended += batch.step()
    raise AssertionError("the batch does not end")


def alone(batch: RunningBatch, item: Item) -> str:
    batch.join(item)
    return finish(batch)[0].generated.text


ITEMS = [row(prompt(5 + 3 * n, seed=n), 4 + n, temperature=n % 2) for n in range(5)]


def test_a_row_that_ends_leaves_at_once_and_the_others_go_on(batch: RunningBatch) -> None:
    long, short = batch.join(row(prompt(4), 9)), batch.join(row(prompt(6), 2))
    while not (ended := batch.step()):
        pass
    assert ended == [short]
    assert batch.rows == [long]
    assert len(long.generated.tokens) == 2


def test_a_row_joins_a_batch_that_runs_and_gets_the_answer_that_it_gets_alone(batch: RunningBatch) -> None:
    wanted = [alone(batch, item) for item in ITEMS]
    waiting = list(ITEMS)
    rows = [batch.join(waiting.pop(0))]
    while batch.rows:
        batch.step()
        if waiting:
            rows.append(batch.join(waiting.pop(0)))
    assert [r.generated.text for r in rows] == wanted
    assert all(r.generated.finish == "length" for r in rows)


def test_a_prompt_read_in_pieces_gets_the_answer_of_one_read_whole(batch: RunningBatch, decoder: OnnxDecoder) -> None:
    item = row(prompt(5 * MIN_PREFILL), 3)
    tokens = [int(decoder.admit([0], [item.arrays["tokens"]])[0].argmax())]
    for _ in range(2):
        tokens.append(int(decoder.step([0], tokens[-1:])[0].argmax()))
    decoder.evict([0])
    batch.join(row(prompt(4), 20))
    while not batch.rows[0].generated.tokens:
        batch.step()
    in_pieces = batch.join(item)
    batch.step()
    assert in_pieces.prefilled == MIN_PREFILL
    finish(batch)
    assert in_pieces.generated.tokens == tokens


def test_rows_that_run_get_a_token_at_each_step_while_a_long_prompt_is_read(batch: RunningBatch) -> None:
    running = batch.join(row(prompt(4), 30))
    batch.step()
    long = batch.join(row(prompt(1500), 1))
    steps = 0
    while long.prefilled < 1500:
        batch.step()
        steps += 1
    assert steps == -(-1500 // MIN_PREFILL)
    assert len(running.generated.tokens) == 1 + steps


def test_what_a_batch_may_hold_is_bounded_by_its_largest_row(batch: RunningBatch) -> None:
    assert batch.room(2048) == MAX_HELD // 2048
    batch.join(row(prompt(4), 508))
    assert batch.room(96) == MAX_HELD // 512 - 1
    assert batch.room(4096) == MAX_HELD // 4096 - 1


def test_a_row_over_the_bound_runs_when_it_is_alone(batch: RunningBatch) -> None:
    assert batch.room(2 * MAX_HELD) == 1


def test_memory_comes_back_when_a_large_row_ends(batch: RunningBatch, decoder: OnnxDecoder) -> None:
    batch.join(row(prompt(4), 92))
    large = batch.join(row(prompt(1900), 2))
    while not large.generated.tokens:
        batch.step()
    held = decoder.memory()
    assert batch.step() == [large]
    assert decoder.memory() < held / 2
    assert batch.room(96) == MAX_HELD // 96 - 1


def test_a_dropped_row_is_never_returned_again(batch: RunningBatch) -> None:
    dropped, other = batch.join(row(prompt(4), 9)), batch.join(row(prompt(5, seed=1), 5))
    batch.step()
    batch.leave([dropped])
    assert finish(batch) == [other]
    assert other.generated.text == alone(batch, row(prompt(5, seed=1), 5))


def test_only_the_row_that_cannot_run_fails_and_the_others_restart(batch: RunningBatch) -> None:
    wanted = [alone(batch, item) for item in ITEMS[:3]]
    rows = [batch.join(item) for item in (*ITEMS[:2], row([1, NO_TOKEN, 2], 3), ITEMS[2])]
    ended = finish(batch)
    assert sorted(map(id, ended)) == sorted(map(id, rows))
    assert isinstance(rows[2].error, ExecutionError)
    good = [r for r in rows if r is not rows[2]]
    assert [r.generated.text for r in good] == wanted
    assert not any(r.error for r in good)


def test_no_row_joins_while_failed_rows_run_alone(batch: RunningBatch) -> None:
    for item in (ITEMS[0], row([NO_TOKEN], 3)):
        batch.join(item)
    batch.step()
    assert batch.room(96) == 0
    assert len(finish(batch)) == 2
    assert batch.room(96) > 0


def test_rows_share_the_device_s_time_and_report_their_mean_batch(batch: RunningBatch) -> None:
    rows = [batch.join(row(prompt(4, seed=n), 8)) for n in range(4)]
    finish(batch)
    assert all(r.device_time > 0 for r in rows)
    assert {r.batch for r in rows} == {4}
    batch.join(row(prompt(4), 2))
    (lonely,) = finish(batch)
    assert lonely.batch == 1

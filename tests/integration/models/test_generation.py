"""generate: every variant against the reference, what parameters do, and what bad input gets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import pytest

from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.settings import TREE, cache_directory
from taxiway.errors import InvalidRequestError, RequestTooLargeError
from workers import port
from workers.pipelines.generation import GenerationPipeline
from workers.pipelines.running_batch import MAX_HELD
from workers.pipelines.text import MAX_BYTES
from workers.port import Pipeline, Placed, Row, Runtime, SteppingRuntime, open_pipeline, open_runtime

pytestmark = pytest.mark.models

MODEL = load_catalogue(TREE / "models").resolve("generate")
OTHERS = [name for name in MODEL.variants if name != MODEL.reference]
PROMPTS = ("Write one sentence about the sea.", "What is 2 + 3?", "What is a prime number?", "Explain what rain is.")
STEPS = 16

Opened = tuple[Runtime, Pipeline]


@pytest.fixture(scope="module")
def store() -> ArtefactStore:
    return ArtefactStore(cache_directory(os.environ))


def opened(store: ArtefactStore, name: str) -> Opened:
    variant = MODEL.variants[name]
    if variant.runtime == "torch" and find_spec("torch") is None:
        pytest.skip("torch is not installed")
    placed = Placed(name, variant.precision, variant.entry, store.files(MODEL, name), "cpu", folder=MODEL.folder)
    runtime = open_runtime(variant.runtime, placed)
    runtime.load()
    return runtime, open_pipeline(MODEL, variant, placed)


@pytest.fixture(scope="module")
def reference(store: ArtefactStore) -> Iterator[Opened]:
    runtime, pipeline = opened(store, MODEL.reference)
    yield runtime, pipeline
    runtime.unload()


@pytest.fixture(scope="module")
def int8(store: ArtefactStore) -> Iterator[Opened]:
    runtime, pipeline = opened(store, "onnx-int8")
    yield runtime, pipeline
    runtime.unload()


@pytest.fixture(scope="module")
def variant(store: ArtefactStore, request: pytest.FixtureRequest) -> Iterator[tuple[str, SteppingRuntime]]:
    """A variant's name and its runtime. Tests are ordered by it, so that each variant is loaded once."""
    shared = {MODEL.reference: "reference", "onnx-int8": "int8"}.get(request.param)
    runtime, _ = request.getfixturevalue(shared) if shared else opened(store, request.param)
    yield request.param, cast(SteppingRuntime, runtime)
    if not shared:
        runtime.unload()


def ask(to: Opened, *prompts: str, **parameters: Any) -> list[Row]:
    """The answers to these prompts as one batch."""
    runtime, pipeline = to
    wanted = {"max_tokens": STEPS} | parameters
    return pipeline.run(runtime, [pipeline.prepare({"prompt": prompt}, wanted) for prompt in prompts])


@pytest.fixture(scope="module")
def continued(reference: Opened) -> list[tuple[np.ndarray, list[int], np.ndarray]]:
    """Prompts, the reference's next tokens, and its logits before each of them."""
    return [_continue(reference, prompt) for prompt in PROMPTS]


def _continue(reference: Opened, prompt: str) -> tuple[np.ndarray, list[int], np.ndarray]:
    stepping = cast(SteppingRuntime, reference[0])
    chat = reference[1].prepare({"prompt": prompt}, {}).arrays["tokens"]
    logits = [stepping.admit([0], [chat])[0]]
    tokens: list[int] = []
    for _ in range(STEPS):
        tokens.append(int(logits[-1].argmax()))
        logits.append(stepping.step([0], tokens[-1:])[0])
    stepping.evict([0])
    return chat, tokens, np.stack(logits)


@pytest.mark.parametrize("variant", OTHERS, indirect=True)
def test_a_variant_agrees_with_the_reference_as_model_yaml_says(
    variant: tuple[str, SteppingRuntime], continued: list[tuple[np.ndarray, list[int], np.ndarray]]
) -> None:
    (name, stepping), slots = variant, list(range(len(PROMPTS)))
    read = [stepping.admit(slots, [chat for chat, _, _ in continued])]
    read += [stepping.step(slots, [tokens[step] for _, tokens, _ in continued]) for step in range(STEPS)]
    got = np.stack(read, axis=1).reshape(-1, read[0].shape[1])
    wanted = np.concatenate([logits for _, _, logits in continued])
    stepping.evict(slots)
    cosine = (got * wanted).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(wanted, axis=1)
    tolerance = MODEL.variants[name].tolerance
    assert cosine.min() >= (tolerance.cosine or 1)
    assert (got.argmax(1) == wanted.argmax(1)).mean() >= (tolerance.agreement or 1)


def test_sentences_come_out(int8: Opened) -> None:
    (sum_, sea) = ask(int8, "What is 2 + 3?", "Write one sentence about the sea.", max_tokens=48)
    assert "5" in sum_["text"]
    assert sea["text"].startswith("The sea is")
    assert sea["text"].endswith(".")
    assert sea["finish-reason"] == "stop"


@pytest.mark.parametrize("which", ["reference", "int8"])
def test_temperature_zero_gives_the_same_text_each_time_whatever_its_batch_mates(
    which: str, request: pytest.FixtureRequest
) -> None:
    to: Opened = request.getfixturevalue(which)
    alone = [ask(to, prompt)[0] for prompt in PROMPTS]
    assert ask(to, *PROMPTS) == alone
    assert ask(to, *reversed(PROMPTS)) == alone[::-1]


def test_a_seed_gives_the_same_text_again_whatever_its_batch_mates(int8: Opened) -> None:
    runtime, pipeline = int8
    wishes: dict[str, Any] = {"temperature": 1.0, "max_tokens": STEPS}
    items = [pipeline.prepare({"prompt": PROMPTS[0]}, wishes | {"seed": seed}) for seed in (1, 2, 1)]
    first, other, again = pipeline.run(runtime, items)
    assert first == again == pipeline.run(runtime, items[:1])[0]
    assert first != other


def test_rows_of_a_batch_end_each_at_its_own_most_tokens(int8: Opened) -> None:
    runtime, pipeline = int8
    items = [pipeline.prepare({"prompt": PROMPTS[2]}, {"max_tokens": most}) for most in (5, 1, 3)]
    answers = pipeline.run(runtime, items)
    assert [(a["tokens"], a["finish-reason"]) for a in answers] == [(5, "length"), (1, "length"), (3, "length")]
    assert answers[0]["text"].startswith(answers[2]["text"])


def test_a_stop_text_ends_the_answer_and_is_cut_off(int8: Opened) -> None:
    whole = ask(int8, PROMPTS[0])[0]["text"]
    stop = whole[8:14]
    (answer,) = ask(int8, PROMPTS[0], stop=["never to be found", stop])
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish-reason"] == "stop"


def test_a_sequence_may_be_admitted_and_evicted_while_others_go_on(reference: Opened) -> None:
    stepping, prepare = cast(SteppingRuntime, reference[0]), reference[1].prepare
    chats = [prepare({"prompt": prompt}, {}).arrays["tokens"] for prompt in PROMPTS[:3]]
    alone = []
    for chat in chats:
        stepping.admit([7], [chat])
        alone.append(stepping.step([7], [57])[0])
        stepping.evict([7])
    stepping.admit([5, 3], chats[:2])
    stepping.admit([9], chats[2:])
    (last,) = stepping.step([9], [57])
    stepping.evict([3])
    first = stepping.step([9, 5], [198, 57])[1]
    stepping.evict([9, 5])
    np.testing.assert_allclose(last, alone[2], atol=1e-3)
    np.testing.assert_allclose(first, alone[0], atol=1e-3)


@pytest.mark.parametrize("variant", list(MODEL.variants), indirect=True)
def test_a_prompt_read_in_pieces_is_read_as_one_read_whole(variant: tuple[str, SteppingRuntime]) -> None:
    (_, stepping), prompt = variant, np.random.default_rng(0).integers(100, 40_000, 300)
    whole = stepping.admit([1, 0, 2], [prompt[:20], prompt, prompt[:40]])[1]
    stepping.evict([1, 0, 2])
    stepping.admit([1, 0, 2], [prompt[:20], prompt[:130], prompt[:40]])
    stepping.extend(0, prompt[130:140])
    stepping.step([2, 1], [57, 198])
    (pieces,) = stepping.extend(0, prompt[140:])
    stepping.evict([1, 0, 2])
    cosine = (pieces * whole).sum() / np.linalg.norm(pieces) / np.linalg.norm(whole)
    assert cosine >= 0.999
    assert pieces.argmax() == whole.argmax()


@pytest.mark.parametrize("which", ["reference", "int8"])
def test_rows_that_join_and_leave_get_the_answers_that_they_get_alone(
    which: str, request: pytest.FixtureRequest
) -> None:
    to: Opened = request.getfixturevalue(which)
    runtime, pipeline = to
    alone = [ask(to, prompt, max_tokens=6 + 3 * n)[0] for n, prompt in enumerate(PROMPTS)]
    items = [pipeline.prepare({"prompt": p}, {"max_tokens": 6 + 3 * n}) for n, p in enumerate(PROMPTS)]
    batch = cast(GenerationPipeline, pipeline).begin(runtime)
    rows = []
    while items or batch.rows:
        if items:
            rows.append(batch.join(items.pop()))
        batch.step()
        batch.step()
    assert [row.answer for row in reversed(rows)] == alone


def test_memory_is_given_back_when_the_last_sequence_leaves(int8: Opened) -> None:
    stepping = cast(SteppingRuntime, int8[0])
    before = stepping.memory()
    stepping.admit([0], [np.arange(100, 130)])
    assert stepping.memory() > before
    stepping.evict([0])
    assert stepping.memory() == before


def test_prompts_over_the_prefill_bound_are_read_in_groups_with_the_same_answers(
    int8: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepping = cast(SteppingRuntime, int8[0])
    monkeypatch.setattr(port, "MAX_PREFILL", 256)  # as many tokens as it has take seconds to read
    random = np.random.default_rng(0)
    prompts = [random.integers(100, 40_000, port.MAX_PREFILL // 8) for _ in range(9)]
    together = stepping.admit(list(range(9)), prompts)
    stepping.evict(list(range(9)))
    alone = stepping.admit([0], prompts[8:])
    stepping.evict([0])
    np.testing.assert_allclose(together[8], alone[0], atol=1e-3)


def test_a_batch_over_the_memory_bound_runs_in_parts_with_the_same_answers(int8: Opened) -> None:
    runtime, pipeline = int8
    size = MAX_HELD // 3
    items = [pipeline.prepare({"prompt": prompt}, {"max_tokens": 4}) for prompt in PROMPTS]
    large = [dataclasses.replace(item, size=size) for item in items]
    assert pipeline.run(runtime, large) == pipeline.run(runtime, items)


def test_control_tokens_in_a_prompt_are_read_as_text(int8: Opened) -> None:
    plain, spelt = (int8[1].prepare({"prompt": p}, {}).arrays["tokens"] for p in ("Hi", "Hi<|im_end|>"))
    assert np.count_nonzero(plain == 2) == np.count_nonzero(spelt == 2)
    assert len(spelt) > len(plain)


@pytest.mark.parametrize(
    "prompt", ["", " \n ", None, 5, b"\xff\xfe"], ids=["empty", "blank", "none", "number", "bytes"]
)
def test_a_prompt_that_is_no_text_is_refused_by_name(prompt: Any, int8: Opened) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        int8[1].prepare({"prompt": prompt}, {})
    assert refused.value.details["field"] == "inputs.prompt"


@pytest.mark.parametrize("prompt", ["word " * 2040, "x" * (MAX_BYTES + 1)], ids=["tokens", "bytes"])
def test_a_prompt_that_leaves_no_room_for_the_answer_is_too_large(prompt: str, int8: Opened) -> None:
    with pytest.raises(RequestTooLargeError):
        int8[1].prepare({"prompt": prompt}, {})


def test_the_longest_prompt_that_is_taken_is_answered(int8: Opened) -> None:
    size = int8[1].prepare({"prompt": "word"}, {"max_tokens": 2}).size
    (answer,) = ask(int8, "word" + " word" * (MODEL.buckets[-1] - size), max_tokens=2)
    assert answer["tokens"] >= 1


@pytest.mark.parametrize("stop", [["."] * 5, [""]], ids=["five", "empty"])
def test_stops_that_cannot_be_meant_are_refused_by_name(stop: list[str], int8: Opened) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        int8[1].prepare({"prompt": "Hi"}, {"stop": stop})
    assert refused.value.details["field"] == "parameters.stop"

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml

from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.models.model import Model, Variant
from tasks.settings import TREE, Settings, cache_directory
from taxiway.errors import InvalidRequestError, RequestTooLargeError
from tests.builders import recorded
from tests.working import QUEUES, Tower, worker_process
from workers.port import ModelLoadError, Pipeline, Placed, Row, Runtime, import_runtime, open_pipeline

pytestmark = pytest.mark.models

CATALOGUE = load_catalogue(TREE / "models")
CASES = [(model, name) for model in ("embed", "sentiment") for name in CATALOGUE.resolve(model).variants]
BATCHES = (1, 5, 2, 8, 3, 4, 7)

TEXTS: list[str] = yaml.safe_load(recorded("texts.yaml"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs are kept: both models have the same network."""
    return tmp_path_factory.mktemp("compiled")


def place(model: Model, name: str, compiled: Path | None = None) -> Placed:
    variant = model.variants[name]
    files = ArtefactStore(cache_directory(os.environ)).files(model, name)
    return Placed(name, variant.precision, variant.entry, files, "cpu", folder=model.folder, compiled=compiled)


def load(model: Model, name: str, compiled: Path | None = None) -> tuple[Pipeline, Runtime]:
    """The variant, loaded; a runtime that is not installed here skips the test."""
    variant: Variant = model.variants[name]
    if variant.runtime == "torch":
        pytest.importorskip("torch")
    placed = place(model, name, compiled)
    runtime = import_runtime(variant.runtime)(placed)
    runtime.load()
    return open_pipeline(model, variant, placed), runtime


def answer(model: Model, name: str, sizes: tuple[int, ...] = BATCHES, compiled: Path | None = None) -> list[Row]:
    """What the variant says of `TEXTS`, taken in batches of the given sizes in turn."""
    pipeline, runtime = load(model, name, compiled)
    items = iter([pipeline.prepare({"text": text}, {}) for text in TEXTS])
    batches: Iterator[list[Row]] = (
        pipeline.run(runtime, batch)
        for size in itertools.cycle(sizes)
        if (batch := list(itertools.islice(items, size)))
    )
    rows = list(itertools.islice(itertools.chain.from_iterable(batches), len(TEXTS)))
    runtime.unload()
    return rows


LEAST_COSINE = {"onnx-fp32": 0.99999, "onnx-int8": 0.95, "torch-fp32": 0.9999, "torch-bf16": 0.999, "jax-fp32": 0.9999}
LEAST_EQUAL = {"onnx-fp32": 1.0, "onnx-int8": 0.95, "torch-fp32": 0.99, "torch-bf16": 0.98, "jax-fp32": 0.99}


@cache
def reference(name: str) -> list[Row]:
    model = CATALOGUE.resolve(name)
    return answer(model, model.reference, (1,))


@pytest.mark.parametrize("name", list(CATALOGUE.resolve("embed").variants))
def test_every_embedding_is_near_to_the_references(name: str, compiled: Path) -> None:
    model = CATALOGUE.resolve("embed")
    ours = np.stack([row["embedding"] for row in answer(model, name, compiled=compiled)])
    theirs = np.stack([row["embedding"] for row in reference("embed")])
    assert ours.shape == (len(TEXTS), 384)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-3)
    assert (ours * theirs).sum(axis=1).min() >= LEAST_COSINE[name]


@pytest.mark.parametrize("name", list(CATALOGUE.resolve("sentiment").variants))
def test_nearly_every_label_is_the_references(name: str, compiled: Path) -> None:
    model = CATALOGUE.resolve("sentiment")
    ours = answer(model, name, compiled=compiled)
    equal = [mine["label"] == other["label"] for mine, other in zip(ours, reference("sentiment"), strict=True)]
    assert np.mean(equal) >= LEAST_EQUAL[name]
    assert all(0.5 <= row["score"] <= 1 for row in ours)


def test_clear_sentences_get_their_label() -> None:
    labels = dict(zip(TEXTS, (row["label"] for row in reference("sentiment")), strict=True))
    assert labels["A quiet, patient, beautiful film about a bridge."] == "positive"
    assert labels["The pilot thanked the tower for the short taxi and the long patience."] == "positive"
    assert labels["Refund refused, twice, without a reason."] == "negative"
    assert labels["My phone died after two days and the shop was closed for the holidays."] == "negative"


def test_a_question_is_nearest_to_the_sentence_that_answers_it() -> None:
    model = CATALOGUE.resolve("embed")
    pipeline, runtime = load(model, model.reference)
    rows = pipeline.run(runtime, [pipeline.prepare({"text": text}, {}) for text in model.examples])
    question, *others = (row["embedding"] for row in rows)
    likeness = [float(question @ other) for other in others]
    assert model.examples[1 + likeness.index(max(likeness))].startswith("A guide to repairing")


@pytest.mark.parametrize(("model", "name"), CASES)
def test_a_text_longer_than_256_tokens_is_cut_there(model: str, name: str) -> None:
    described = CATALOGUE.resolve(model)
    pipeline = open_pipeline(described, described.variants[name], place(described, name))
    assert pipeline.prepare({"text": "word " * 2000}, {}).size == 256
    assert pipeline.prepare({"text": "word"}, {}).size == 3  # with the two special tokens


SURROGATE = "\ud800"


@pytest.mark.cases("value, message")
def test_what_is_no_text_is_refused_by_the_name_of_the_input(value: object, message: str) -> None:
    model = CATALOGUE.resolve("embed")
    pipeline = open_pipeline(model, model.variants[model.reference], place(model, model.reference))
    with pytest.raises(InvalidRequestError, match=message) as refused:
        pipeline.prepare({"text": value}, {})
    assert refused.value.details["field"] == "inputs.text"


def test_a_text_over_64_kib_is_too_large() -> None:
    model = CATALOGUE.resolve("embed")
    pipeline = open_pipeline(model, model.variants[model.reference], place(model, model.reference))
    assert pipeline.prepare({"text": "a" * 2**16}, {}).size > 0
    with pytest.raises(RequestTooLargeError, match="expected at most 65536 bytes of text, got 65538"):
        pipeline.prepare({"text": "ä" * (2**15 + 1)}, {})


def test_weights_of_another_network_do_not_load() -> None:
    model = CATALOGUE.resolve("sentiment")
    placed = place(model, model.reference)
    pytest.importorskip("torch")
    wrong = Placed("torch-fp32", "fp32", "minilm", {"weights": placed.files["head"]}, "cpu")
    with pytest.raises(ModelLoadError, match="torch-fp32: torch cannot load it"):
        import_runtime("torch")(wrong).load()


def test_the_trained_head_is_the_one_that_the_page_describes() -> None:
    page = (Path(CATALOGUE.resolve("sentiment").folder) / "README.md").read_text(encoding="utf-8")
    accuracy = CATALOGUE.resolve("sentiment").variants["onnx-fp32"].accuracy
    assert accuracy is not None and accuracy >= 0.80
    assert f"{100 * accuracy:.1f} %" in page


@pytest.mark.slow
def test_a_worker_keeps_what_jax_compiled_for_the_next_one(settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("jax")
    (tmp_path / "queues.yaml").write_text(QUEUES.replace("[python, echo]", "[echo, jax]").replace(", slab]", "]"))
    for kept in ("sha256", "derived"):
        (tmp_path / kept).symlink_to(settings.cache / kept)
    fleet = replace(settings, queues=tmp_path / "queues.yaml", cache=tmp_path)
    with Tower(fleet) as tower, worker_process(fleet):
        first = tower.result(tower.order("sentiment", "Well done.", variant="jax-fp32"), within=90)
        programs = set(tmp_path.glob("compiled/*/jax/*-cache"))
    with Tower(fleet) as tower, worker_process(fleet):
        again = tower.result(tower.order("sentiment", "Well done.", variant="jax-fp32"), within=90)
    assert programs and programs == set(tmp_path.glob("compiled/*/jax/*-cache"))
    assert first.outputs == again.outputs

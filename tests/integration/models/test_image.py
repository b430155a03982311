"""classify-image: every variant on real photographs, and what bad input gets."""

import collections
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.models.model import Model
from tasks.settings import TREE, cache_directory
from taxiway.errors import InvalidRequestError, RequestTooLargeError
from workers.pipelines.image import MAX_PIXELS, batch_of, decode
from workers.port import Item, Pipeline, Placed, Runtime, import_runtime, open_pipeline
from workers.recipes.torch_checkpoint import UnsafeCheckpointError, read_checkpoint

pytestmark = pytest.mark.models

MODEL = load_catalogue(TREE / "models").resolve("classify-image")
OTHERS = [name for name in MODEL.variants if name != MODEL.reference]


@pytest.fixture(scope="module")
def store() -> ArtefactStore:
    return ArtefactStore(cache_directory(os.environ))


@pytest.fixture(scope="module")
def photographs(store: ArtefactStore) -> dict[str, bytes]:
    """Each example photograph, by what it shows."""
    return {
        example["artefact"].removeprefix("photo-").replace("-", " "): store.example(MODEL, example)
        for example in MODEL.examples
    }


def opened(store: ArtefactStore, model: Model, name: str) -> tuple[Runtime, Pipeline]:
    variant = model.variants[name]
    if find_spec(variant.runtime if variant.runtime == "torch" else "onnxruntime") is None:
        pytest.skip("torch is not installed")
    placed = Placed(name, variant.precision, variant.entry, store.files(model, name), "cpu", folder=model.folder)
    runtime = import_runtime(variant.runtime)(placed)
    runtime.load()
    return runtime, open_pipeline(model, variant, placed)


@pytest.fixture(scope="module")
def reference(store: ArtefactStore) -> Iterator[tuple[Runtime, Pipeline]]:
    runtime, pipeline = opened(store, MODEL, MODEL.reference)
    yield runtime, pipeline
    runtime.unload()


@pytest.fixture(scope="module")
def items(reference: tuple[Runtime, Pipeline], photographs: dict[str, bytes]) -> list[Item]:
    return [reference[1].prepare({"image": photograph}, {}) for photograph in photographs.values()]


def logits(runtime: Runtime, items: list[Item]) -> np.ndarray:
    return runtime.run({"pixels": batch_of([item.arrays["pixels"] for item in items])})["logits"]


def test_the_reference_names_what_photographs_show_with_its_best_five_in_order(
    reference: tuple[Runtime, Pipeline], items: list[Item], photographs: dict[str, bytes]
) -> None:
    answers = reference[1].run(reference[0], items)
    said = [answer["label"].lower() for answer in answers]
    wrong = [(shown, label) for shown, label in zip(photographs, said, strict=True) if shown != label]
    assert len(wrong) <= 1, wrong
    for answer in answers:
        assert len(answer["labels"]) == len(answer["scores"]) == 5
        assert answer["scores"] == sorted(answer["scores"], reverse=True)
        assert (answer["label"], answer["score"]) == (answer["labels"][0], answer["scores"][0])


@pytest.mark.parametrize("name", OTHERS)
def test_a_variant_agrees_with_the_reference(
    name: str, store: ArtefactStore, reference: tuple[Runtime, Pipeline], items: list[Item]
) -> None:
    runtime, _ = opened(store, MODEL, name)
    got, wanted = logits(runtime, items), logits(reference[0], items)
    cosine = (got * wanted).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(wanted, axis=1)
    least, equal = {"onnx-int8": (0.97, 0.95), "torch-fp32": (0.9999, 1)}[name]
    assert cosine.min() >= least
    assert (got.argmax(1) == wanted.argmax(1)).mean() >= equal


def test_other_rows_of_a_batch_do_not_change_an_answer(reference: tuple[Runtime, Pipeline], items: list[Item]) -> None:
    runtime, pipeline = reference
    alone = [pipeline.run(runtime, [item])[0] for item in items]
    together = pipeline.run(runtime, items)
    assert [answer["labels"] for answer in alone] == [answer["labels"] for answer in together]


def test_pixels_give_the_same_answer_as_the_photograph_that_they_come_from(
    reference: tuple[Runtime, Pipeline], items: list[Item]
) -> None:
    runtime, pipeline = reference
    pixels = pipeline.prepare({"pixels": batch_of([items[0].arrays["pixels"]])[0].tolist()}, {})
    assert pipeline.run(runtime, [pixels]) == pipeline.run(runtime, items[:1])


TOO_BRIGHT = np.full((224, 224, 3), 1.5, np.float32)


@pytest.mark.cases("row")
def test_a_row_that_is_no_photograph_is_refused(row: dict[str, Any], reference: tuple[Runtime, Pipeline]) -> None:
    with pytest.raises(InvalidRequestError, match=r"image|pixels"):
        reference[1].prepare(row, {})


def test_a_photograph_that_is_cut_short_is_refused_by_name(photographs: dict[str, bytes]) -> None:
    whole = photographs["strawberry"]
    with pytest.raises(InvalidRequestError) as refused:
        decode(whole[: len(whole) // 2], 224)
    assert refused.value.details["field"] == "inputs.image"


def test_damage_anywhere_gives_pixels_or_a_refusal_and_nothing_else(photographs: dict[str, bytes]) -> None:
    random = np.random.default_rng(0)
    whole = np.frombuffer(photographs["goose"], np.uint8)
    for _ in range(200):
        damaged = whole.copy()
        damaged[random.integers(0, 2000, 20)] = random.integers(0, 256, 20)
        try:
            assert decode(damaged.tobytes(), 224).shape == (224, 224, 3)
        except (InvalidRequestError, RequestTooLargeError):
            continue


@pytest.mark.parametrize("side", [6000, 12000, 60000])
def test_a_small_file_that_would_be_a_huge_picture_is_refused_before_it_is_decoded(side: int) -> None:
    assert side * side > MAX_PIXELS
    with pytest.raises(RequestTooLargeError) as refused:
        decode(_png_header(side), 224)
    assert refused.value.details["limit"] == MAX_PIXELS


def _png_header(side: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1000))
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, body))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_picture_is_turned_upright_as_its_camera_noted() -> None:
    pixels = np.zeros((300, 300, 3), np.uint8)
    pixels[:150] = 255
    stored, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3  # held upside down
    Image.fromarray(pixels).save(stored, "JPEG", exif=exif)
    upright = decode(stored.getvalue(), 224)
    assert upright[:100].max() < 25
    assert upright[-100:].min() > 230


class _Exploit:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch called",)


@pytest.mark.parametrize(
    "payload",
    [_Exploit(), {"weight": _Exploit()}, collections.Counter(), Path("x"), json.JSONDecoder],
    ids=["call", "call inside", "class", "object", "name"],
)
def test_a_checkpoint_that_names_anything_but_tensors_is_refused_and_calls_nothing(
    payload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth"
    path.write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(UnsafeCheckpointError):
        read_checkpoint(path)
    assert not (tmp_path / "called").exists()


def test_both_forms_of_a_checkpoint_read_as_torch_reads_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "whole": whole,
        "turned": whole.T,
        "part": whole[1:, 2:4],
        "none": torch.zeros(0),
        "one": torch.tensor(7),
    }
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pth"
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        read = read_checkpoint(path)
        assert read.keys() == tensors.keys()
        assert all(np.array_equal(read[name], tensors[name].numpy()) for name in tensors)
        assert all(value.flags.c_contiguous for value in read.values())


def checkpoint(path: Path, *, count: int, shape: tuple[int, ...], packed: int = zipfile.ZIP_STORED) -> Path:
    """An archive as torch writes it, of one tensor: `shape` numbers that all are the first of its storage's `count`."""
    storage = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI%d\ntQ" % count
    sizes, strides = (b"".join(b"I%d\n" % n for n in numbers) for numbers in (shape, (0,) * len(shape)))
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"I0\n(" + sizes + b"t(" + strides + b"ttR"
    with zipfile.ZipFile(path, "w", packed) as archive:
        archive.writestr("m/data.pkl", b"}Vw\n" + tensor + b"s.")
        archive.writestr("m/data/0", np.full(100, 7, np.float32).tobytes())
    return path


def test_a_checkpoint_by_hand_is_read_as_it_is_meant(tmp_path: Path) -> None:
    read = read_checkpoint(checkpoint(tmp_path / "m.pth", count=100, shape=(2, 3)))
    assert read["w"].tolist() == [[7, 7, 7], [7, 7, 7]]


@pytest.mark.cases("changes, message")
def test_a_checkpoint_that_would_unpack_to_more_than_it_is_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsafeCheckpointError, match=message):
        read_checkpoint(checkpoint(tmp_path / "m.pth", **{"count": 100, "shape": (2, 3), **changes}))


def test_a_picture_of_more_scans_than_any_camera_makes_is_refused_before_it_is_decoded() -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=True)
    whole, marker = file.getvalue(), b"\xff\xda"
    last = whole[whole.rindex(marker) : whole.rindex(b"\xff\xd9")]
    assert decode(whole, 32).shape == (32, 32, 3)
    with pytest.raises(InvalidRequestError, match="expected at most 100 scans"):
        decode(whole[:-2] + last * 100 + whole[-2:], 32)


def test_a_tensor_that_reaches_outside_its_storage_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    torch.save({"w": torch.zeros(7, 9)}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    assert raw.count(b"K\x07K\x09\x86") == 1
    path.write_bytes(raw.replace(b"K\x07K\x09\x86", b"K\x7fK\x09\x86"))
    with pytest.raises(UnsafeCheckpointError, match="outside"):
        read_checkpoint(path)

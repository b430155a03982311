"""A photograph in, and out what is on it: JPEG or PNG bytes, or pixels that the caller prepared.

The graph takes `pixels`, float32 (batch, side, side, 3) from 0 to 1, and gives `logits`, float32 (batch, labels).
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tasks.models.catalogue import Model, TensorSpec, Variant
from tasks.models.sizes import size_of_row
from taxiway.errors import InvalidRequestError, RequestTooLargeError
from workers.decide.faults import said
from workers.pipelines import Item, Row
from workers.pipelines.tensors import read_tensor
from workers.runtimes import Placed, Runtime

FORMATS = ("JPEG", "PNG")

MAX_PIXELS = 32_000_000
"""The largest photograph that is decoded, in pixels: about 100 MB as red, green and blue bytes."""

MAX_SCANS = 100
"""The most passes over the picture that a JPEG may make: each costs time, whatever it holds. Cameras make about ten."""

MARGIN = 32
"""Pixels: the crop is side / (side + MARGIN) of the shorter side, as EfficientNet was evaluated (Tan and Le 2019)."""

_BEST = 5
_SHOWN = 8  # bytes of what is no photograph
_SCAN = b"\xff\xda"  # the marker that begins one; no other byte follows 0xff in a picture's data but 0x00 and restarts

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, IndexError, struct.error, zlib.error)
"""What Pillow raises on broken files, found by feeding it some."""


class ImagePipeline:
    """Decodes, crops and scales photographs, and names what the graph sees.

    Args:
        model: whose inputs are `image` and `pixels`, of which a row has one.
        labels: the names of the graph's classes, in order.
    """

    def __init__(self, model: Model, labels: Sequence[str]) -> None:
        self._model = model
        specs = {spec.name: spec for spec in model.inputs}
        self._pixels: TensorSpec = specs["pixels"]
        self._side = self._pixels.shape[1]
        self._labels = labels

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        """The row as `pixels`; a photograph's as bytes, a quarter of what the graph gets, until its batch runs.

        Raises:
            InvalidRequestError: neither or both inputs, bytes that are no JPEG or PNG, pixels outside 0 to 1.
            RequestTooLargeError: a photograph over `MAX_PIXELS`, or over the model's last bucket.
        """
        given = {name: value for name, value in row.items() if value is not None}
        if len(given) != 1 or not given.keys() <= {"image", "pixels"}:
            message = f"expected one of the inputs 'image' and 'pixels', got {sorted(given)}"
            raise InvalidRequestError(message, field="inputs")
        pixels = decode(given["image"], self._side) if "image" in given else self._checked(given["pixels"])
        return Item({"pixels": pixels}, size_of_row(self._model, given), parameters)

    def run(self, runtime: Runtime, items: Sequence[Item]) -> list[Row]:
        """`label` and `score`, and the best five as `labels` and `scores`, for each item."""
        logits = runtime.run({"pixels": batch_of([item.arrays["pixels"] for item in items])})["logits"]
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = raised / raised.sum(axis=1, keepdims=True)
        return [self._answer(share) for share in shares]

    def _checked(self, value: Any) -> np.ndarray:
        pixels = read_tensor(self._pixels, value)
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            message = f"inputs.pixels: expected values from 0 to 1, got {pixels.min()} to {pixels.max()}"
            raise InvalidRequestError(message, field="inputs.pixels")
        return pixels

    def _answer(self, share: np.ndarray) -> Row:
        best = np.argsort(-share, kind="stable")[:_BEST]
        labels = [self._labels[index] for index in best]
        scores = [float(share[index]) for index in best]
        return {"label": labels[0], "score": scores[0], "labels": labels, "scores": scores}


def decode(value: object, side: int) -> np.ndarray:
    """A photograph's bytes as uint8 (side, side, 3): its middle, scaled by bicubic interpolation.

    Raises:
        InvalidRequestError: not bytes, no JPEG or PNG, one that is cut short, or a JPEG of over `MAX_SCANS`.
        RequestTooLargeError: over `MAX_PIXELS`; told from its header, before it is decoded.
    """
    if not isinstance(value, bytes | bytearray | memoryview):
        message = f"inputs.image: expected JPEG or PNG bytes, got {type(value).__name__}"
        raise InvalidRequestError(message, field="inputs.image")
    try:
        with Image.open(io.BytesIO(value), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(f"{image.width} by {image.height}")
            if image.format != "PNG" and bytes(value).count(_SCAN) > MAX_SCANS:
                raise InvalidRequestError(f"inputs.image: expected at most {MAX_SCANS} scans", field="inputs.image")
            return _cropped(image, side)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(str(error)) from error
    except UnidentifiedImageError as error:
        message = (
            f"inputs.image: expected a JPEG or PNG, got {len(value)} bytes that begin with {bytes(value[:_SHOWN])!r}"
        )
        raise InvalidRequestError(message, field="inputs.image") from error
    except _BROKEN as error:
        message = f"inputs.image: expected a whole JPEG or PNG, got one that is broken: {said(error)}"
        raise InvalidRequestError(message, field="inputs.image") from error


def _cropped(image: Image.Image, side: int) -> np.ndarray:
    image.draft("RGB", (4 * side, 4 * side))  # lets a large JPEG be decoded at a half, a quarter or an eighth
    ImageOps.exif_transpose(image, in_place=True)
    upright = image if image.mode == "RGB" else image.convert("RGB")
    width, height = upright.size
    crop = min(width, height) * side / (side + MARGIN)
    left, top = (width - crop) / 2, (height - crop) / 2
    middle = upright.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + crop, top + crop))
    return np.asarray(middle)


def batch_of(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of shape (side, side, 3), uint8 or from 0 to 1, as one float32 batch from 0 to 1."""
    batch = np.empty((len(rows), *rows[0].shape), np.float32)
    for row, place in zip(rows, batch, strict=True):
        if row.dtype == np.uint8:
            np.divide(row, 255, out=place, dtype=np.float32)
        else:
            place[:] = row
    return batch


def _too_large(got: str) -> RequestTooLargeError:
    message = f"inputs.image: expected at most {MAX_PIXELS} pixels, got {got}"
    return RequestTooLargeError(message, field="inputs.image", limit=MAX_PIXELS)


def open_pipeline(model: Model, variant: Variant, placed: Placed) -> ImagePipeline:
    """The pipeline for one variant, from the file in the role `labels`: a JSON list of names."""
    return ImagePipeline(model, json.loads(placed.files["labels"].read_text(encoding="utf-8")))

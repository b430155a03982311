"""Image classification of JPEG or PNG bytes, or of pixels that the caller prepared.

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

from tasks.models.model import Model, Variant
from tasks.models.sizes import size_of_row
from tasks.models.tensor_spec import TensorSpec
from taxiway.errors import InvalidRequestError, RequestTooLargeError, invalid
from workers.decide.faults import text_of
from workers.pipelines.tensors import row_array
from workers.port import Item, Placed, Row, Runtime

FORMATS = ("JPEG", "PNG")

MAX_PIXELS = 32_000_000
"""The largest image that is decoded, in pixels: about 100 MB as RGB."""

MAX_SCANS = 100
"""The most scans of a progressive JPEG: each costs time, whatever it contains. Cameras write about ten."""

MARGIN = 32
"""Pixels: the crop is side / (side + MARGIN) of the shorter side, as EfficientNet was evaluated (Tan and Le 2019)."""

_BEST = 5
_SHOWN_BYTES = 8  # bytes of an invalid image that the error shows
_SCAN = b"\xff\xda"  # the marker of a scan; inside image data 0xff is followed only by 0x00 or a restart marker

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, IndexError, struct.error, zlib.error)
"""What Pillow raises on corrupt files, found by experiment."""


class ImagePipeline:
    """Decodes, crops and scales images, and labels them.

    Args:
        model: has the inputs `image` and `pixels`, of which a row has one.
        labels: the class names in the graph's order.
    """

    def __init__(self, model: Model, labels: Sequence[str]) -> None:
        self._model = model
        specs = {spec.name: spec for spec in model.inputs}
        self._pixels: TensorSpec = specs["pixels"]
        self._side = self._pixels.shape[1]
        self._labels = labels

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        """The row as `pixels`; an image stays uint8, a quarter of the graph's float32, until its batch runs.

        Raises:
            InvalidRequestError: neither or both inputs, bytes that are not JPEG or PNG, or pixels outside 0 to 1.
            RequestTooLargeError: an image over `MAX_PIXELS` or the model's last bucket.
        """
        given = {name: value for name, value in row.items() if value is not None}
        if len(given) != 1 or not given.keys() <= {"image", "pixels"}:
            message = f"expected one of the inputs 'image' and 'pixels', got {sorted(given)}"
            raise InvalidRequestError(message, field="inputs")
        pixels = decode(given["image"], self._side) if "image" in given else self._checked(given["pixels"])
        return Item({"pixels": pixels}, size_of_row(self._model, given), parameters)

    def run(self, runtime: Runtime, items: Sequence[Item]) -> list[Row]:
        """`label` and `score`, and the top five as `labels` and `scores`, for each item."""
        logits = runtime.run({"pixels": batch_of([item.arrays["pixels"] for item in items])})["logits"]
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = raised / raised.sum(axis=1, keepdims=True)
        return [self._answer(share) for share in shares]

    def _checked(self, value: Any) -> np.ndarray:
        pixels = row_array(self._pixels, value)
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            raise invalid("inputs.pixels", "values from 0 to 1", f"{pixels.min()} to {pixels.max()}")
        return pixels

    def _answer(self, share: np.ndarray) -> Row:
        best = np.argsort(-share, kind="stable")[:_BEST]
        labels = [self._labels[index] for index in best]
        scores = [float(share[index]) for index in best]
        return {"label": labels[0], "score": scores[0], "labels": labels, "scores": scores}


def decode(value: object, side: int) -> np.ndarray:
    """An image's bytes as uint8 (side, side, 3): its centre crop, scaled by bicubic interpolation.

    Raises:
        InvalidRequestError: not bytes, not a JPEG or PNG, truncated, or a JPEG with over `MAX_SCANS`.
        RequestTooLargeError: over `MAX_PIXELS` by its header, before it is decoded.
    """
    if not isinstance(value, bytes | bytearray | memoryview):
        raise invalid("inputs.image", "JPEG or PNG bytes", type(value).__name__)
    try:
        with Image.open(io.BytesIO(value), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(f"{image.width} by {image.height}")
            if image.format != "PNG" and bytes(value).count(_SCAN) > MAX_SCANS:
                raise invalid("inputs.image", f"at most {MAX_SCANS} scans")
            return _cropped(image, side)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(str(error)) from error
    except UnidentifiedImageError as error:
        begin = bytes(value[:_SHOWN_BYTES])
        raise invalid("inputs.image", "a JPEG or PNG", f"{len(value)} bytes that begin with {begin!r}") from error
    except _BROKEN as error:
        raise invalid("inputs.image", "a valid JPEG or PNG", f"a corrupt one: {text_of(error)}") from error


def _cropped(image: Image.Image, side: int) -> np.ndarray:
    image.draft("RGB", (4 * side, 4 * side))  # lets a large JPEG be decoded at 1/2, 1/4 or 1/8 of its size
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

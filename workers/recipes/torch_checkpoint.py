"""Recipe: a torch checkpoint of plain tensors as safetensors, without torch and without running its code.

A checkpoint is a pickle, which may call anything. This reader lets it name only what tensors are made of; whatever
else a file names refuses the whole file. Both of torch's forms are read: the older stream and the zip archive.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import save_file

_MAGIC = 0x1950A86A20F9469CFC6C  # opens the older form (torch/serialization.py: MAGIC_NUMBER)
_SHARED = 4  # tensors may share a storage: embeddings that are the output's weights, too
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class UnsafeCheckpointError(ValueError):
    """The file names something that is no part of a tensor, or is no checkpoint at all."""


class _TensorUnpickler(pickle.Unpickler):
    """Knows ordered dicts, storages and how a tensor is put together; `storages` are those it met, by key.

    They are runs of numbers that tensors are views of, and are filled after the tensors that name them. They lie in the
    file as they are, so that all of them together have at most its `size` in bytes.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file)
        self.storages: dict[str, np.ndarray] = {}
        self._left = size

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise UnsafeCheckpointError(f"the checkpoint names {module}.{name}: only plain tensors are read")

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or dtype not in _STORAGES.values() or any(part is not None for part in view):
            raise UnsafeCheckpointError(f"expected a plain storage, got {pid!r}")
        if key not in self.storages:
            self._left -= count * np.dtype(dtype).itemsize
            if count < 0 or self._left < 0:
                raise UnsafeCheckpointError("its storages: expected at most the bytes of the file, got more")
            self.storages[key] = np.zeros(count, dtype)
        return self.storages[key]


def read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name.

    Raises:
        UnsafeCheckpointError: it holds anything else.
    """
    read = _read_archive if zipfile.is_zipfile(path) else _read_stream
    try:
        tensors = read(path)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UnsafeCheckpointError(f"{path.name}: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, np.ndarray) for value in tensors.values()):
        raise UnsafeCheckpointError(
            f"{path.name}: expected a mapping of names to tensors, got {type(tensors).__name__}"
        )
    size = path.stat().st_size
    if sum(value.nbytes for value in tensors.values()) > _SHARED * size:  # views of a little memory, again and again
        raise UnsafeCheckpointError(f"{path.name}: expected tensors of at most {_SHARED} times its {size} bytes")
    # safetensors writes memory as it lies, and a tensor may lie in another order than its shape says.
    return {str(name): np.array(value, order="C") for name, value in tensors.items()}


def make(inputs: Mapping[str, Path], output: Path, options: Mapping[str, Any]) -> None:
    """Write the floating-point tensors of `inputs["checkpoint"]`; there are no options."""
    tensors = read_checkpoint(inputs["checkpoint"])
    save_file({name: value for name, value in tensors.items() if value.dtype.kind == "f"}, str(output))


def _read_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise UnsafeCheckpointError("expected an archive that is not compressed, as torch writes it")
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        reader = _TensorUnpickler(io.BytesIO(archive.read(index)), path.stat().st_size)
        tensors = reader.load()
        for key, storage in reader.storages.items():
            _fill(storage, archive.read(f"{index.removesuffix('data.pkl')}data/{key}"))
    return tensors


def _read_stream(path: Path) -> Any:
    """Magic, version, machine, tensors and the storages' keys are pickles; then each storage's count and values."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if _TensorUnpickler(file, size).load() != _MAGIC:
            raise UnsafeCheckpointError(f"{path.name} is no torch checkpoint")
        for _ in ("version", "machine"):
            _TensorUnpickler(file, size).load()
        reader = _TensorUnpickler(file, size)
        tensors = reader.load()
        for key in _TensorUnpickler(file, size).load():
            storage = reader.storages[key]
            file.read(8)
            _fill(storage, file.read(storage.nbytes))
    return tensors


def _fill(storage: np.ndarray, raw: bytes) -> None:
    """Give a storage its values, little-endian; they may be more or fewer than it was said to have."""
    if len(raw) != storage.nbytes:
        raise UnsafeCheckpointError(f"a storage: expected {storage.nbytes} bytes, got {len(raw)}")
    storage.view(np.uint8)[:] = np.frombuffer(raw, np.uint8)


def _rebuild(storage: np.ndarray, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    """The view of a storage that a tensor is; checked, for strides could reach outside."""
    reach = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if min((offset, *shape, *stride), default=0) < 0 or (0 not in shape and reach >= len(storage)):
        raise UnsafeCheckpointError(f"a tensor of shape {shape} reaches outside its storage")
    strides = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False)

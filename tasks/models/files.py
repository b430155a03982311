"""What is known of the files beside a model.yaml, read again only where a file changed."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from tasks.models.graphs import Signature, read_signature

HASHED = 256 * 2**20
"""Bytes of the largest file that is hashed when a catalogue is read: about a second. Workers hash what they open."""

Stamp = tuple[int, int, int]
"""What changes with a file's content: its size in bytes, when it was written in nanoseconds, and its inode."""


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of the file that `path` leads to, through links; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def local_sha256(path: Path) -> str | None:
    """The file's SHA-256 in hexadecimal digits; None where it is too large to be hashed here, or gone."""
    stamp = stamp_of(path)
    return None if stamp is None or stamp[0] > HASHED else _sha256(path, stamp)


def local_signature(path: Path) -> Signature:
    """The signature of an ONNX file. Raises `GraphError`, and `OSError` where it cannot be read."""
    return _signature(path, stamp_of(path))


def forget() -> None:
    """Read every file again when it is asked for next."""
    _sha256.cache_clear()
    _signature.cache_clear()


@lru_cache(maxsize=1024)
def _sha256(path: Path, _stamp: Stamp) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


@lru_cache(maxsize=1024)
def _signature(path: Path, _stamp: Stamp | None) -> Signature:
    return read_signature(path)

"""The keys file: read again when it changes, and written atomically."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from router.access.keyring import Caller, Key, Keyring, KeysError, parse_keys, written

logger = logging.getLogger(__name__)

LOOK = 1.0
"""Seconds between two checks for changes of the file: a revoked key stays valid for at most this long."""

_Mark = tuple[int, int, int]


class KeyFile:
    """The keys in a file. While it is missing or invalid, the last valid keys stay in force and the error is logged.

    Raises:
        KeysError: the file cannot be read initially.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mark = _mark(path)
        self._keyring = read_keys(path)
        self._next = time.monotonic() + LOOK

    def caller(self, secret: bytes) -> Caller | None:
        """The caller whose key `secret` is, now."""
        if time.monotonic() >= self._next:
            self._check()
        return self._keyring.caller(secret, time.time())

    def _check(self) -> None:
        self._next = time.monotonic() + LOOK
        mark = _mark(self._path)
        if mark == self._mark:
            return
        self._mark = mark
        try:
            self._keyring = read_keys(self._path)
        except KeysError as error:
            logger.error("keys not reloaded", extra={"error": str(error)})
        else:
            logger.info("keys reloaded", extra={"keys": len(self._keyring.keys)})


def read_keys(path: Path) -> Keyring:
    """The keys in the file at `path`.

    Raises:
        KeysError: the file cannot be read, or is invalid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{path}: expected a readable file of keys: {type(error).__name__}") from error
    return parse_keys(text, str(path))


def write_keys(path: Path, keys: Sequence[Key]) -> None:
    """Write these keys to the file. A new file is readable only by its owner; an existing one keeps its mode.

    Raises:
        OSError: the file cannot be written; its content is left unchanged.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # for its owner alone
    try:
        if path.exists():
            os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(written(keys))
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _mark(path: Path) -> _Mark | None:
    """A value that changes with the file's content; None while the file is missing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino

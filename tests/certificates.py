"""Certificates that tests make for themselves."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

_HERE = "subjectAltName=DNS:localhost,IP:127.0.0.1"
_NO_AUTHORITY = "basicConstraints=critical,CA:FALSE"
_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")


def authority(folder: Path) -> Path:
    """An authority's certificate, `ca.pem`; and by it, for a server here and for a client of it, one with its key each.

    These are `server.pem`, `server.key`, `client.pem` and `client.key`.
    """
    ca, key = folder / "ca.pem", folder / "ca.key"
    _request(ca, key, "/CN=authority", "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign")
    for name, extension in (("server", _HERE), ("client", "keyUsage=digitalSignature")):
        signed = ("-CA", str(ca), "-CAkey", str(key))
        _request(folder / f"{name}.pem", folder / f"{name}.key", f"/CN={name}", extension, _NO_AUTHORITY, signed=signed)
    return ca


def _request(certificate: Path, key: Path, subject: str, *extensions: str, signed: Sequence[str] = ()) -> None:
    added = [word for extension in extensions for word in ("-addext", extension)]
    named = ("-subj", subject, *added, "-keyout", str(key), "-out", str(certificate))
    subprocess.run(["openssl", "req", "-x509", *_EC, *signed, *named], check=True, capture_output=True)


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for this machine that signs itself, and its key: `cert.pem` and `key.pem`."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    _request(certificate, key, "/CN=localhost", _HERE, _NO_AUTHORITY)
    return certificate, key

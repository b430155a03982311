"""The site's Ed25519 key, which signs receipts; 64 hexadecimal digits, as is its public key."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tasks.queues.receipts import Verify
from tasks.settings import SettingsError

_EXPECTED = "a file with 64 hexadecimal digits"


def load_site_key(path: str | Path) -> Ed25519PrivateKey:
    """The private key in a file.

    Raises:
        SettingsError: it cannot be read, or is no key.
    """
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(Path(path).read_text()))
    except (OSError, ValueError) as error:
        raise SettingsError("TAXIWAY_SITE_KEY", _EXPECTED, str(path)) from error


def public_text(key: Ed25519PrivateKey) -> str:
    """Its public key."""
    return key.public_key().public_bytes_raw().hex()


def verifier(public: str) -> Verify:
    """Verifies signatures with a public key. Raises `ValueError` if the text is none."""
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))

    def verify(signature: bytes, signed: bytes) -> bool:
        try:
            key.verify(signature, signed)
        except InvalidSignature:
            return False
        return True

    return verify

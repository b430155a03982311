"""Seals payloads to the holders of keys, and opens them: HPKE (RFC 9180), base mode, with X25519 and AES-256-GCM.

Each key's name is a digest of its public part. What a sealed value is for is authenticated with it: its direction, job
and model, so that none can stand for another. Anyone can seal inputs; outputs and errors only who holds the keys, as a
code that is made with the private keys is authenticated, too.

Needs the package `cryptography`.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from taxiway.contract.job import Result
from taxiway.contract.sealed import ContentFacts, Sealed, sealed_error, sealed_in
from taxiway.contract.values import from_wire
from taxiway.contract.wire import key_id
from taxiway.errors import UNREADABLE, SealedError, TaxiwayError, cut

Direction = Literal["inputs", "outputs", "error"]

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_CHARACTERS, _DETAILS = 320, 4  # of an error, so that all of it is below `errors.MAX_ERROR` once it is sealed
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class SealKeys:
    """Private keys, 32 bytes each; without any it can only seal inputs."""

    def __init__(self, private: Iterable[bytes] = ()) -> None:
        keys = [X25519PrivateKey.from_private_bytes(one) for one in private]
        self._private = {key_id(key.public_key().public_bytes_raw()): key for key in keys}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the keys."""
        return tuple(self._private)

    def public(self, name: str) -> bytes:
        """The public part of a key. Raises `SealedError` if it is not here."""
        return self._key(name).public_key().public_bytes_raw()

    def seal_inputs(
        self,
        content: Any,
        keys: Sequence[bytes],
        job: str,
        model: str,
        facts: ContentFacts,
        locality: str | None = None,
    ) -> Sealed:
        """Seal inputs and parameters, plain values in pairs or their MessagePack, to the holders of all public keys."""
        sealed = Sealed(keys=tuple(map(key_id, keys)), job=job, model=model, content="", facts=facts, locality=locality)
        plain = content if isinstance(content, bytes) else _encode(content)
        return self._sealed(plain, sealed, keys, "inputs")

    def open_inputs(self, sealed: Sealed, *, jobs: Sequence[str], model: str) -> tuple[Any, dict[str, Any]]:
        """Inputs and parameters, sealed for one of these jobs and this model.

        Raises:
            SealedError: they were altered, or sealed for another job or model, or a key is not here.
        """
        if sealed.job not in jobs or sealed.model != model:
            raise SealedError(f"sealed for job {sealed.job} of {sealed.model}, not for this one", keys=sealed.keys)
        try:
            inputs, parameters = _decode(self._opened(sealed, "inputs"))
            return from_wire(inputs), from_wire(parameters, "parameters")
        except (*UNREADABLE, ValueError, TypeError) as error:
            raise _altered(sealed) from error

    def seal_result(self, result: Result, inputs: Sealed) -> Result:
        """The result of a job with these sealed inputs, its outputs sealed with the same keys."""
        sealed = self._answer(_encode(result.outputs), inputs, "outputs")
        return msgspec.structs.replace(result, outputs=sealed.value)

    def open_outputs(self, outputs: dict[str, Any], job: str) -> dict[str, Any]:
        """The outputs of a job; as they are, if they are plain.

        Raises:
            SealedError: they were altered, or sealed for another job, or a key is not here.
        """
        sealed = sealed_in(outputs)
        if sealed is None:
            return outputs
        try:
            opened: dict[str, Any] = from_wire(_decode(self._opened(_for(sealed, job), "outputs")), "outputs")
            return opened
        except UNREADABLE as error:
            raise _altered(sealed) from error

    def seal_error(self, error: TaxiwayError, inputs: Sealed) -> TaxiwayError:
        """The error of a job with these sealed inputs: its class alone can be read."""
        most = _CHARACTERS // _DETAILS
        details = [
            (name, it)
            for name, it in error.details.items()
            if isinstance(it, int | float) or (isinstance(it, str) and len(it) <= most)
        ]
        sealed = self._answer(_encode([cut(error.message, _CHARACTERS), dict(details[:_DETAILS])]), inputs, "error")
        return type(error)(f"the text of this error is sealed (key {_listed(sealed)})", sealed=sealed.text)

    def open_error(self, error: TaxiwayError, job: str) -> TaxiwayError:
        """A job's error; as it is, if it is plain. Raises `SealedError` as `open_outputs`."""
        sealed = sealed_error(error)
        if sealed is None:
            return error
        try:
            message, details = _decode(self._opened(_for(sealed, job), "error"))
        except (*UNREADABLE, ValueError, TypeError) as flaw:
            raise _altered(sealed) from flaw
        return type(error)(message, **details)

    def _answer(self, content: bytes, inputs: Sealed, direction: Direction) -> Sealed:
        plain = Sealed(keys=inputs.keys, job=inputs.job, model=inputs.model, content="")
        return self._sealed(content, plain, [self.public(name) for name in inputs.keys], direction)

    def _sealed(self, content: bytes, sealed: Sealed, keys: Sequence[bytes], direction: Direction) -> Sealed:
        for name, key in zip(sealed.keys, keys, strict=True):
            public = X25519PublicKey.from_public_bytes(key)
            content = _SUITE.encrypt(content, public, self._purpose(sealed, name, direction))
        return msgspec.structs.replace(sealed, content=base64.b64encode(content).decode())

    def _opened(self, sealed: Sealed, direction: Direction) -> bytes:
        try:
            content = base64.b64decode(sealed.content, validate=True)
            for name in reversed(sealed.keys):
                content = _SUITE.decrypt(content, self._key(name), self._purpose(sealed, name, direction))
        except (InvalidTag, ValueError) as error:
            raise _altered(sealed) from error
        return content

    def _purpose(self, sealed: Sealed, name: str, direction: Direction) -> bytes:
        """What is authenticated with a sealed value."""
        purpose = msgspec.json.encode(["taxiway sealed 1", direction, sealed.job, sealed.model, sealed.keys])
        if direction == "inputs":
            return purpose
        return purpose + hmac.digest(self._key(name).private_bytes_raw(), purpose, "sha256")

    def _key(self, name: str) -> X25519PrivateKey:
        if name not in self._private:
            raise SealedError(f"sealed with key {name}, which is not here: TAXIWAY_SEAL_KEYS has the keys", keys=[name])
        return self._private[name]


def _for(sealed: Sealed, job: str) -> Sealed:
    if sealed.job != job:
        raise SealedError(f"sealed for job {sealed.job}, not for this one", keys=sealed.keys)
    return sealed


def _altered(sealed: Sealed) -> SealedError:
    return SealedError(
        f"cannot be opened with key {_listed(sealed)}: it was altered after it was sealed", keys=sealed.keys
    )


def _listed(sealed: Sealed) -> str:
    return ", ".join(sealed.keys)

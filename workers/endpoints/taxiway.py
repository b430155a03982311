"""Another fleet: a row is a job there, of any model, as a batch of one (`taxiway.contract.peers`).

`peers` has the connection. What this fleet may hand out is in queues.yaml; nothing is discovered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from tasks.models.model import ANSWER_BOUND, Model, generates
from tasks.models.sizes import measured
from tasks.models.tensor_spec import TensorSpec
from taxiway.contract.limits import check_values
from taxiway.contract.peers import PATH, PeerAnswer, PeerContent, PeerPiece
from taxiway.contract.stream import Delta, SentMessage
from taxiway.contract.values import DATATYPES, is_tensor, raw_bytes, to_array
from taxiway.errors import TaxiwayError
from workers.endpoints.protocol import AnswerReader, AskItem, Discovery, EngineRequest, ServedModel, malformed
from workers.port import Row

HEALTH = ABOUT = PATH
"""Where fleets meet. A probe is a ping on the connection."""

MAX_TEXT = 16 * 2**20
"""Characters of a generated answer that are passed on as they come."""


def prepare(served: ServedModel, row: Row, parameters: Mapping[str, Any]) -> AskItem:
    """See `protocol.EndpointProtocol`."""
    model = served.model
    inputs = {spec.name: batched(spec, row[spec.name]) for spec in model.inputs if spec.name in row}
    given = {key: value for key, value in parameters.items() if value is not None}
    size = measured(model, inputs) + (int(parameters[ANSWER_BOUND]) if generates(model) else 0)
    body = _encode(PeerContent(inputs, given))
    return AskItem({}, size, parameters, ask=EngineRequest(served.called, body, lambda _: PeerReader(model)))


def extensions(body: bytes) -> Collection[str]:
    """Nothing: what a fleet can do is in the version of the protocol."""
    return ()


def announced(body: bytes) -> Sequence[str]:
    """The models that it offers now."""
    return msgspec.msgpack.decode(body, type=list[str])


def discover() -> Discovery:
    """Nothing (queues.yaml refuses it)."""
    yield from ()
    return {}


class PeerReader(AnswerReader):
    """Takes in an answer, which may come twice after the line was cut: what was passed on before is left out."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._message = SentMessage()
        self._sent = self._at = 0
        self._outputs: dict[str, Any] | None = None

    @property
    def text(self) -> str:  # type: ignore[override]  # a plain attribute for readers that have none
        """See `AnswerReader`."""
        return self._message.text("content")

    def feed(self, chunk: bytes) -> Sequence[str | Delta]:
        """Nothing: frames come by `take` and `end`."""
        return ()

    def take(self, piece: PeerPiece) -> Sequence[str | Delta]:
        """The text and the deltas that a piece adds.

        Raises:
            EndpointError: there is no end to them.
        """
        text, beside = piece.text[max(self._at - piece.at, 0) :], piece.beside[max(self._sent - piece.sent, 0) :]
        self._at, self._sent = max(self._at, piece.at + len(piece.text)), self._sent + len(beside)
        if self._at > MAX_TEXT or self._sent > MAX_TEXT:
            raise malformed("an answer without an end")
        self.pieces += bool(text or beside)
        return [*([text] if text else ()), *beside]

    def end(self, answer: PeerAnswer) -> None:
        """Take in the whole answer."""
        self.tokens, self._outputs = answer.tokens, answer.outputs

    def answer(self) -> Row:
        """See `AnswerReader`."""
        if self._outputs is None:
            raise malformed("it ended before the answer did")
        try:
            wanted = [spec for spec in self._model.outputs if not spec.optional or spec.name in self._outputs]
            return {spec.name: only_row(spec, self._outputs[spec.name]) for spec in wanted}
        except (TaxiwayError, LookupError, TypeError, ValueError) as error:
            raise malformed(str(error)) from error


_encode = msgspec.msgpack.Encoder().encode
_DATATYPES = {np.dtype(name): datatype for datatype, name in DATATYPES.items()}


def batched(spec: TensorSpec, value: Any) -> Any:
    """A row's value as a batch of one; as it is, for an input without a batch axis."""
    if isinstance(value, np.ndarray) and value.dtype in _DATATYPES:
        array = value if spec.batch_axis is None else np.expand_dims(value, spec.batch_axis)
        return {"shape": list(array.shape), "datatype": _DATATYPES[array.dtype], "data": raw_bytes(array)}
    plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return plain if spec.batch_axis is None else [plain]


def only_row(spec: TensorSpec, value: Any) -> Any:
    """The only row of an output. Raises as `to_array` does, and `ValueError`."""
    check_values(value, spec.name)
    rows = np.moveaxis(to_array(value, spec.name), spec.batch_axis or 0, 0) if is_tensor(value) else value
    if not isinstance(rows, list | np.ndarray) or len(rows) != 1:
        raise ValueError(f"{spec.name}: expected a batch of one")
    return rows[0].item() if isinstance(rows[0], np.generic) else rows[0]

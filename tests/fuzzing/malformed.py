"""Malformed messages of every kind that an account with write access to the broker could send."""

import json
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import msgspec

from taxiway.contract.keys import CANCEL, INFER
from taxiway.contract.request import Request
from taxiway.contract.wire import encode_envelope, request_body, task_envelope

_ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, 2**70, 10**400, -(10**400),
    "", "\0", "\ud800", "taxiway", [], {}, [[]], {"a": {}}, "x" * 5000,
    ["echo"] * 100, "9999-99-99", "2999-01-01T00:00:00", "../../etc/passwd", "zlib", "application/x-python-serialize",
)  # fmt: skip
NUMBERS = (
    b"0", b"1", b"-1", b"-0", b"2147483648", b"9223372036854775808", b"1" + b"0" * 400, b"-1" + b"0" * 400, b"9" * 4200,
    b"9" * 5000, b"1e308", b"1e400", b"-1e400", b"0.5", b"1e-400", b"true", b"null", b'"1"', b"[]", b"{}",
)  # fmt: skip
"""Texts of JSON numbers that no caller means, and of what is none."""

_HEADERS = (
    "eta", "expires", "stamped_headers", "stamps", "compression", "timelimit", "retries", "shadow", "group",
    "group_index", "root_id", "parent_id", "argsrepr", "kwargsrepr", "ignore_result", "origin",
    "traceparent", "tracestate", "taxiway",
)  # fmt: skip
_EMBEDDED = ("callbacks", "errbacks", "chain", "chord")
_PICKLE = b"cos\nsystem\n(S'true'\ntR."


class Malformed:
    """An endless supply, the same for the same seed. `ticket` is one of a message that was good once."""

    def __init__(self, seed: int, ticket: str = "") -> None:
        self._chance = random.Random(seed)
        good = task_envelope(INFER, "job", request_body(Request(model="echo", inputs="a")), header={}, origin="fuzz")
        if ticket:
            good.headers["taxiway"] = ticket
        self._good = encode_envelope(good)
        self._kinds: tuple[Callable[[], bytes], ...] = (
            self._noise, self._cut, self._flipped, self._odd_field, self._odd_field, self._odd_body, self._deep,
            self._pickled, self._many_digits, self._odd_header, self._odd_header,
        )  # fmt: skip

    def message(self) -> bytes:
        """One more."""
        return self._chance.choice(self._kinds)()

    def _noise(self) -> bytes:
        return self._chance.randbytes(self._chance.randrange(200))

    def _cut(self) -> bytes:
        return self._good[: self._chance.randrange(len(self._good))]

    def _flipped(self) -> bytes:
        message = bytearray(self._good)
        for _ in range(self._chance.randrange(1, 8)):
            message[self._chance.randrange(len(message))] = self._chance.randrange(256)
        return bytes(message)

    def _odd_field(self) -> bytes:
        """Values that no sender writes, in one to three places."""
        message = json.loads(self._good)
        for _ in range(self._chance.randrange(1, 4)):
            place = self._chance.choice((message, message.get("headers"), message.get("properties")))
            if isinstance(place, dict) and place:
                place[self._chance.choice(sorted(place))] = deepcopy(
                    self._chance.choice(_ODD)
                )  # it may be a place next
        return json.dumps(message).encode()

    def _odd_body(self) -> bytes:
        """A body that is no request, in a message that is one."""
        odd = self._chance.choice
        request = {"model": odd(("echo", *_ODD)), "inputs": odd(_ODD), "deadline": odd(_ODD), "tenant": odd(_ODD)}
        body = json.dumps(odd(([[], request, {}], [[odd(_ODD)], {}, {}], odd(_ODD)))).encode()
        task = odd((INFER, CANCEL, "celery.chord", ""))
        return encode_envelope(task_envelope(task, f"odd-{self._chance.random()}", body, header={}, origin="fuzz"))

    def _odd_header(self) -> bytes:
        """A request that is good but for what Celery reads of it: its headers, and what follows from its task."""
        odd = self._chance.choice
        embed = dict.fromkeys(_EMBEDDED)
        if self._chance.random() < 0.3:
            embed[odd(_EMBEDDED)] = odd((*_ODD, [odd(_ODD)], [{"task": odd(_ODD)}], {"task": "t", "kwargs": odd(_ODD)}))
        body = json.dumps([[], {"model": "echo", "inputs": "a", "deadline": 2}, embed]).encode()
        message = task_envelope(INFER, f"header-{self._chance.random()}", body, header={}, origin="fuzz")
        for _ in range(self._chance.randrange(3)):
            message.headers[odd(_HEADERS)] = deepcopy(odd(_ODD))
        if self._chance.random() < 0.1:
            message.content_encoding = odd(("klingon", "utf-16", "binary", "", "\0"))
        return json.dumps(msgspec.to_builtins(message)).encode()

    def _deep(self) -> bytes:
        opened = self._chance.choice((b"[", b'{"a":', b'{"body":"","headers":{},"properties":['))
        return opened * self._chance.randrange(1, 3000)

    def _pickled(self) -> bytes:
        message = task_envelope(INFER, "pickled", _PICKLE, header={}, origin="fuzz")
        message.content_type, message.content_encoding = "application/x-python-serialize", "binary"
        return encode_envelope(message)

    def _many_digits(self) -> bytes:
        return b'{"body":' + b"9" * self._chance.randrange(1, 9000) + b"}"

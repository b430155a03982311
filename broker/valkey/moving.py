"""Moves of waiting messages, run by the server at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from broker.mover import PEEK_BYTES, Step
from broker.valkey.lua import Call
from taxiway.contract.keys import LEAD, WORK, job_key, priority_list, priority_lists


def peek_call(queue: str, most: int) -> Call:
    """Shows up to `most` messages of each level of a queue, those served last, and how many there are in all."""
    return Call("peek", priority_lists(queue), [most, PEEK_BYTES])


def move_call(token: str, steps: Sequence[Step], messages: Sequence[bytes], *, record: bool) -> Call:
    """Moves messages, and records it; `messages` are the new ones as the broker keeps them, handles the old ones."""
    keys, args = [LEAD, WORK], list[Any]([token])
    for step, message in zip(steps, messages, strict=True):
        peeked = step.peeked
        keys += (priority_list(peeked.queue, peeked.level), priority_list(step.queue, peeked.level))
        keys.append(job_key(peeked.job))
        args += (peeked.handle, message, *(_fields(step) if record else (0,)))
    return Call("move", keys, args)


def record_call(token: str, steps: Sequence[Step]) -> Call:
    """Records moves that another server makes; answers 0 where the lead was lost."""
    keys = [LEAD, WORK, *(job_key(step.peeked.job) for step in steps)]
    return Call("record_moves", keys, [token, *(part for step in steps for part in _fields(step))])


def _fields(step: Step) -> tuple[Any, ...]:
    return len(step.fields) * 2, *(text for pair in step.fields.items() for text in pair)

"""Keeps requests that name a patient on the ward's machines: a list of patterns, and the label of what matches one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

LABEL = "ward"

PATTERNS = [
    re.compile(r"\bMRN[ :]*\d{6,10}\b"),  # a medical record number
    re.compile(r"\bpatient\b", re.IGNORECASE),
]


def classify(model: str, inputs: Any, parameters: Mapping[str, Any]) -> str | None:
    """`LABEL` if a text in the request matches one of `PATTERNS`."""
    found = any(pattern.search(text) for text in texts([inputs, parameters]) for pattern in PATTERNS)
    return LABEL if found else None


def texts(value: Any) -> Iterator[str]:
    """Every text in a value of nested lists and mappings, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield value.decode("utf-8", "replace")
    elif isinstance(value, Mapping):
        yield from texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from texts(one)

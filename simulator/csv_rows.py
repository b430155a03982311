"""Rows of a CSV file as values of a struct, whose fields are the columns.

A column whose field has no default must be there; an empty cell is None.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from tasks.document import located
from taxiway.errors import flaw, quoted

Row = TypeVar("Row", bound=msgspec.Struct)


class CsvError(ValueError):
    """A file, or what stands for it, is invalid: where, what was expected and what was found.

    `line` counts from 1; 0 means the whole file.
    """

    def __init__(self, source: str, line: int, expected: str, got: object, *, column: str = "") -> None:
        place = ": ".join(filter(None, (source, f"line {line}" if line else "", column)))
        super().__init__(f"{place}: expected {expected}, got {got}")
        self.source = source
        self.line = line
        self.column = column
        self.expected = expected
        self.got = got


def read_rows(path: Path, *kinds: type[Row], error: type[CsvError]) -> Iterator[Row]:
    """The rows of the file at `path`, as the first of `kinds` that fits its header.

    Raises:
        CsvError: as `error`: the file cannot be read, or a row is invalid.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield from parse_rows(lines, *kinds, source=str(path), error=error)
    except (OSError, UnicodeDecodeError) as wrong:
        raise error(str(path), 0, "a readable CSV file in UTF-8", flaw(wrong)) from wrong


def parse_rows(lines: Iterable[str], *kinds: type[Row], source: str, error: type[CsvError]) -> Iterator[Row]:
    """The rows in these lines, of which the first is the header; `source` is only named in errors.

    Raises:
        CsvError: as `error`: a row is invalid, or there is none.
    """
    reader = csv.reader(lines, strict=True, skipinitialspace=True)
    records = filter(None, reader)  # without blank lines
    row = None
    try:
        header = next(records, [])
        kind = _kind(header, kinds, source, error)
        for record in records:
            if len(record) != len(header):
                raise error(source, reader.line_num, f"{len(header)} fields", len(record))
            cells = {name: cell or None for name, cell in zip(header, record, strict=True)}
            row = msgspec.convert(cells, kind, strict=False)
            yield row
    except csv.Error as wrong:
        raise error(source, reader.line_num, "CSV", wrong) from wrong
    except msgspec.ValidationError as wrong:
        path, expected, value = located(cells, kind, str(wrong))
        got = "nothing" if value is None else quoted(value)
        raise error(source, reader.line_num, expected, got, column=".".join(path)) from wrong
    if row is None:
        raise error(source, 0, "at least one row", "none")


def columns_of(kind: type[msgspec.Struct]) -> str:
    """The header that a file of such rows has."""
    needed, optional = _columns(kind)
    return ",".join(needed) + (f" (and {', '.join(optional)})" if optional else "")


def _kind(header: Sequence[str], kinds: Sequence[type[Row]], source: str, error: type[CsvError]) -> type[Row]:
    for kind in kinds:
        if _fits(header, kind):
            return kind
    expected = f"the columns {' or '.join(map(columns_of, kinds))}"
    raise error(source, 1, expected, ",".join(header) or "nothing")


def _fits(header: Sequence[str], kind: type[msgspec.Struct]) -> bool:
    needed, optional = _columns(kind)
    unknown = set(header).difference(needed, optional) if kind.__struct_config__.forbid_unknown_fields else set()
    return set(needed) <= set(header) and not unknown and len(set(header)) == len(header)


def _columns(kind: type[msgspec.Struct]) -> tuple[list[str], list[str]]:
    """The columns that a file must have, and those that it may have."""
    fields = msgspec.structs.fields(kind)
    return [one.encode_name for one in fields if one.required], [one.encode_name for one in fields if not one.required]

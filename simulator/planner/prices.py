"""The price file: what instances cost per hour, and which of them offer devices of a fleet's classes."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simulator.fleet import DeviceClass, Fleet, FleetError
from tasks.document import Verbatim

COLUMNS = ("instance", "accelerator", "accelerator_count", "usd_per_hour", "usd_per_hour_spot")
"""Required columns of a price file; further columns are ignored."""

_DEAREST = 1e6


class PriceError(ValueError):
    """A price file is invalid: file, line (from 1; 0 means the whole), column, what was expected and what was found."""

    def __init__(self, file: str, line: int, column: str, expected: str, got: object) -> None:
        place = ": ".join(filter(None, (file, f"line {line}" if line else "", column)))
        super().__init__(f"{place}: expected {expected}, got {got}")
        self.file = file
        self.line = line
        self.column = column
        self.expected = expected
        self.got = got


@dataclass(frozen=True, slots=True)
class Instance:
    """A kind of machine: `devices` of an accelerator, or one CPU if `accelerator` is empty."""

    name: str
    accelerator: str
    devices: int
    usd_per_hour: float
    spot_usd_per_hour: float | None


@dataclass(frozen=True, slots=True)
class Offer:
    """An instance as part of a hardware class: its devices, at the price that the class pays."""

    hardware_class: str
    instance: str
    devices: int
    usd_per_hour: float


@dataclass(frozen=True, slots=True)
class Prices:
    """A price file's instances, in its order."""

    file: str
    instances: tuple[Instance, ...]


def load_prices(path: Path) -> Prices:
    """Read `path`.

    Raises:
        PriceError: the file cannot be read, or a row is invalid.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return parse_prices(lines, str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise PriceError(str(path), 0, "", "a readable CSV file in UTF-8", error) from error


def parse_prices(lines: Iterable[str], file: str = "prices.csv") -> Prices:
    """The instances in the lines of a CSV file; the first line is the header.

    Raises:
        PriceError: names `file`, line and column. A missing or zero price is an error.
    """
    reader = csv.DictReader(lines, strict=True)
    try:
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise PriceError(file, 1, "", f"the columns {','.join(COLUMNS)}", f"none called {', '.join(missing)}")
        instances = tuple(_instance(row, file, reader.line_num) for row in reader)
    except csv.Error as error:
        raise PriceError(file, reader.line_num + 1, "", "CSV", error) from error
    if not instances:
        raise PriceError(file, 0, "", "at least one instance", "none")
    return Prices(file, instances)


def offers(fleet: Fleet, prices: Prices) -> tuple[Offer, ...]:
    """What can be bought for each class, in the order of the classes: the cheapest instance of each size.

    A size is left out if several smaller instances give the same devices at no higher cost.

    Raises:
        FleetError: a class names nothing in the price file, or is spot and has no spot price there.
    """
    return tuple(offer for name, device in fleet.classes.items() for offer in _offers(fleet.file, name, device, prices))


def _instance(row: Mapping[str, str | None], file: str, line: int) -> Instance:
    fields = {name: row[name] for name in COLUMNS}
    if None in fields.values() or None in row:
        raise PriceError(file, line, "", "as many fields as the header has", "more or fewer")
    text = {name: (value or "").strip() for name, value in fields.items()}
    if not text["instance"]:
        raise PriceError(file, line, "instance", "a name", "nothing")
    count = text["accelerator_count"]
    if not (count.isascii() and count.isdigit() and len(count) < 5) or (int(count) == 0) != (not text["accelerator"]):
        expected = "a count from 1 to 9999 beside an accelerator, 0 without"
        raise PriceError(file, line, "accelerator_count", expected, repr(count))
    spot = text["usd_per_hour_spot"]
    return Instance(
        name=text["instance"],
        accelerator=text["accelerator"],
        devices=max(int(count), 1),
        usd_per_hour=_dollars(text["usd_per_hour"], file, line, "usd_per_hour"),
        spot_usd_per_hour=_dollars(spot, file, line, "usd_per_hour_spot") if spot else None,
    )


def _dollars(text: str, file: str, line: int, column: str) -> float:
    try:
        dollars = float(text)
    except ValueError:
        dollars = math.nan
    if not 0 < dollars < _DEAREST:
        raise PriceError(file, line, column, "a price above 0", repr(text) if text else "nothing")
    return dollars


def _offers(file: str, name: str, device: DeviceClass, prices: Prices) -> Iterator[Offer]:
    """The class's offers by size, smallest first."""
    cheapest: dict[int, Offer] = {}
    for instance in _named(file, name, device, prices):
        price = instance.spot_usd_per_hour if device.spot else instance.usd_per_hour
        if price is None:
            continue
        offer = Offer(name, instance.name, instance.devices, price)
        held = cheapest.get(offer.devices, offer)
        cheapest[offer.devices] = min(held, offer, key=lambda one: (one.usd_per_hour, one.instance))
    if not cheapest:
        raise FleetError(
            file, f"classes.{name}.spot", f"an instance with a spot price in {prices.file}", Verbatim("none")
        )
    for devices in sorted(cheapest):
        if not any(_replaces(smaller, cheapest[devices]) for smaller in cheapest.values()):
            yield cheapest[devices]


def _replaces(smaller: Offer, larger: Offer) -> bool:
    times, rest = divmod(larger.devices, smaller.devices)
    return times > 1 and not rest and times * smaller.usd_per_hour <= larger.usd_per_hour * (1 + 1e-9)


def _named(file: str, name: str, device: DeviceClass, prices: Prices) -> Sequence[Instance]:
    """The instances that the class's `accelerator` and `instances` name."""
    if device.accelerator is None and not device.instances:
        expected = f"an accelerator, or instances, of {prices.file}"
        raise FleetError(file, f"classes.{name}.accelerator", expected, Verbatim("neither"))
    alike = [one for one in prices.instances if device.accelerator in (None, one.accelerator)]
    if not alike:
        expected = (
            f"an accelerator of {prices.file}, one of {sorted({one.accelerator for one in prices.instances} - {''})}"
        )
        raise FleetError(file, f"classes.{name}.accelerator", expected, device.accelerator)
    known = {one.name for one in alike}
    for wanted in device.instances:
        if wanted not in known:
            which = f" with {device.accelerator}" if device.accelerator else ""
            raise FleetError(file, f"classes.{name}.instances", f"instances of {prices.file}{which}", wanted)
    return [one for one in alike if not device.instances or one.name in device.instances]

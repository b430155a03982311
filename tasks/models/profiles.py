"""Profile files: how a model's variants run on one device, measured or derived; and the book that looks them up.

`models/<name>/profiles/<device>.yaml` is one file per model and device. Only this module knows its form. `load_book`
reads files; everything else here is a function of its arguments.

Also how long a model's recent answers to a tenant were, and how long the next one will be. Workers count each generated
answer by its bin; the state store decays earlier counts (`finish.lua`); routers size a request by a quantile. No
decision knows the actual length of an answer.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from tasks.document import DocumentError, Size, parse_document, read_document, written_out
from tasks.models.model import ANSWER_BOUND, FINISH, GENERATED, Model, Profile, generates
from tasks.topology import DeviceKind

_HEAD = """\
# Seconds a batch: max(floor, base + step * size + slope * rows * size). docs/profiles.md explains it.
# A point is rows, their mean size, and the median of its seconds.
"""

UNSURE = 2.0
"""Observed over predicted run time that is assumed until one is learned."""

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Ratio = Annotated[float, msgspec.Meta(gt=0)]
Rows = Annotated[int, msgspec.Meta(ge=1)]


class ProfileError(DocumentError):
    """A profile file is invalid: file, path inside it, expected and actual value."""


class Processor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The device of a file; `name` is what the device calls itself, `threads` the threads of one operation."""

    kind: DeviceKind
    name: str
    threads: Rows = 1


class Residuals(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Quantiles of observed over predicted seconds, over all timed runs, with the same weight for each point."""

    p50: Ratio
    p90: Ratio
    p95: Ratio
    p99: Ratio


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One measured batch: rows, their mean size, and the median of its seconds."""

    rows: Rows
    size: Annotated[float, msgspec.Meta(gt=0)]
    seconds: Seconds


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One variant on the device: `max(floor, base + step·size + slope·rows·size)` seconds per batch."""

    date: Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    packages: dict[str, str] = {}
    load: Seconds
    """Seconds until a cold variant is ready."""
    memory: Size
    """Bytes that it then holds."""
    peak: Size
    """The most bytes that it held after a batch."""
    base: Seconds
    step: Seconds = 0.0
    slope: Seconds
    floor: Seconds = 0.0
    residual: Residuals
    disturbed: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """Share of the timed seconds in which other processes used the processor."""
    points: tuple[Point, ...] = ()

    @property
    def profile(self) -> Profile:
        """The curve, as placement reads it."""
        return msgspec.convert(self, Profile, from_attributes=True)


class DeviceProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file. A derived one names the `rows` of public tables that it is made from, and what else was `assumed`."""

    model: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]*:[1-9][0-9]*$")]
    device: Processor
    source: Literal["measured", "derived"]
    rows: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    variants: Annotated[dict[str, Measurement], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, slots=True)
class KnownProfile:
    """What is known of a variant on a device. `residual` is R, what most runs stay within as a multiple of predicted.

    `memory` is bytes at the largest batch. `warning` names its source if that is not a measurement of this device.
    """

    profile: Profile
    residual: float
    memory: int
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class ProfileBook:
    """All profiles. Made by `make_book`; an empty book returns model.yaml's defaults."""

    files: Mapping[tuple[str, str, DeviceKind], tuple[DeviceProfile, ...]] = field(default_factory=dict)

    def lookup(self, model: Model, variant: str, kind: DeviceKind, name: str) -> KnownProfile:
        """The best available profile of the variant on the device of that kind and name, with a warning if it is weak.

        First a measurement of this device; then one of another device of its kind; then model.yaml's default for the
        kind, or its first.
        """
        found = self.files.get((model.id, variant, kind), ())
        own = next((file for file in found if file.device.name == name), None)
        if own is not None:
            derived = f"the profile of {own.device.name!r} is derived from public figures, not measured"
            return _known(own, variant, derived if own.source == "derived" else None)
        if found:
            source = "" if found[0].source == "measured" else f", {found[0].source} from public figures"
            where = f"{name!r}" if name else f"this {kind} device"
            return _known(found[0], variant, f"no profile of {where}: that of {found[0].device.name!r}{source}")
        return _default(model, variant, kind, name)


def _known(file: DeviceProfile, variant: str, doubt: str | None) -> KnownProfile:
    measured = file.variants[variant]
    learned = max(1.0, measured.residual.p95)
    return KnownProfile(
        profile=measured.profile,
        residual=learned if doubt is None else max(UNSURE, learned),
        memory=max(measured.memory, measured.peak),
        warning=doubt,
    )


def make_book(files: Iterable[DeviceProfile]) -> ProfileBook:
    """The book of these files; if several fit, measured ones come first, then the newest."""
    index: dict[tuple[str, str, DeviceKind], list[DeviceProfile]] = {}
    for file in files:
        for variant in file.variants:
            index.setdefault((file.model, variant, file.device.kind), []).append(file)
    ordered = {key: tuple(sorted(found, key=lambda f: _rank(f, key[1]))) for key, found in index.items()}
    return ProfileBook(ordered)


def parse_profile(text: str, file: str = "profile.yaml") -> DeviceProfile:
    """The profile that the YAML `text` describes.

    Raises:
        ProfileError: names `file`, the path inside it, expected and actual value.
    """
    parsed = parse_document(text, DeviceProfile, file=file, error=ProfileError)
    if parsed.source == "derived" and not parsed.rows:
        raise ProfileError(file, "rows", "the rows of public tables that a derived profile is made from", [])
    for name, variant in parsed.variants.items():
        try:
            datetime.date.fromisoformat(variant.date)
        except ValueError as error:
            raise ProfileError(file, f"variants.{name}.date", "a day of the calendar", variant.date) from error
    return parsed


def load_profile(path: Path) -> DeviceProfile:
    """Read `path`.

    Raises:
        ProfileError: the file is missing or invalid, or is in another model's folder.
    """
    parsed = parse_profile(read_document(path, file=str(path), error=ProfileError), str(path))
    folder = path.parent.parent.name
    if parsed.model.partition(":")[0] != folder:
        raise ProfileError(str(path), "model", f"a version of the folder's model {folder!r}", parsed.model)
    return parsed


def load_book(root: Path) -> tuple[ProfileBook, tuple[ProfileError, ...]]:
    """The book of every file in `root`/*/profiles, and the errors of those that could not be read.

    An invalid profile does not prevent a start: its device then has the defaults, with a warning.
    """
    files, errors = [], []
    for path in sorted(root.glob("*/profiles/*.yaml")):
        try:
            files.append(load_profile(path))
        except ProfileError as error:
            errors.append(error)
    return make_book(files), tuple(errors)


def render_profile(profile: DeviceProfile) -> str:
    """The file's text, for people and `parse_profile`."""
    ordered = msgspec.structs.replace(profile, variants=dict(sorted(profile.variants.items())))
    return _HEAD + written_out(ordered)


def profile_path(root: Path, model: str, device: Processor) -> Path:
    """The path, below `root`, of the profile of `model` (`name:version` or `name`) on a device."""
    return root / model.partition(":")[0] / "profiles" / f"{device_slug(device)}.yaml"


def device_slug(device: Processor) -> str:
    """A device's name for files: lower case, its kind first (`cuda-nvidia-l4`, `tpu-v5-lite`)."""
    name = re.sub(r"\((?:r|tm)\)", "", device.name.lower())
    words = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    threads = f"-{device.threads}-threads" if device.threads > 1 else ""
    named = words if words.startswith(device.kind) else f"{device.kind}-{words or 'unnamed'}"
    return f"{named}{threads}"


def _rank(file: DeviceProfile, variant: str) -> tuple[bool, int, int, str]:
    day = datetime.date.fromisoformat(file.variants[variant].date)
    return file.source == "derived", file.device.threads, -day.toordinal(), file.device.name


def _default(model: Model, variant: str, kind: DeviceKind, name: str) -> KnownProfile:
    described = model.variants[variant]
    used = kind if kind in described.profiles else next(iter(described.profiles))
    missing = f"{name!r}" if name else f"any {kind} device"
    warning = f"no profile of {missing}: model.yaml's default for {used}"
    return KnownProfile(described.profiles[used], UNSURE, described.memory, warning)


Lengths = Mapping[int, float]
"""Weight of each bin that answers fell in; the newest answer weighs 1."""

QUANTILE = 0.8
"""Share of answers that are no longer than predicted: sufficient for deadlines, without assuming the worst case."""

_STOPPED = "stop"  # the value of `FINISH` of an answer that its model ended
_PRIOR_WEIGHT = 4.0  # answers that the prior, half of `max_tokens`, counts for
_BINS_A_DOUBLING = 4  # resolution: 19 %, rounded up
_LAST = 81  # a million tokens; longer answers count there


def bin_of(tokens: int) -> int:
    """The bin of an answer: the smallest that holds it."""
    if tokens <= 0:
        return 0
    return min(_LAST, 1 + math.ceil(_BINS_A_DOUBLING * math.log2(tokens) - 1e-9))


def tokens_of(place: int) -> int:
    """The longest answer of a bin."""
    return math.floor(2 ** ((place - 1) / _BINS_A_DOUBLING) + 1e-9) if place > 0 else 0


def predicted(lengths: Lengths, most: int) -> int:
    """Tokens that an answer of at most `most` will have, at the quantile; between 0 and `most`."""
    weights = dict(lengths)
    middle = bin_of(most // 2)
    weights[middle] = weights.get(middle, 0.0) + _PRIOR_WEIGHT
    wanted = QUANTILE * math.fsum(weights.values())
    seen = 0.0
    for place in sorted(weights):
        seen += weights[place]
        if seen >= wanted:
            return min(tokens_of(place), max(most, 0))
    return max(most, 0)


def length_of(answer: Mapping[str, Any]) -> int:
    """Tokens that a device computed for a generated answer, including the one that ended it; 0 for other answers."""
    return int(answer.get(GENERATED, 0)) + (answer.get(FINISH) == _STOPPED)


def read_lengths(raw: bytes) -> Lengths:
    """The weights in the state store; empty if they cannot be read."""
    try:
        return _decode(raw)
    except msgspec.MsgspecError:
        return {}


def ran_size(model: Model, size: int, parameters: Mapping[str, Any], answer: Mapping[str, Any]) -> int:
    """The size of a row that ran, with the actual length of its answer; `size` assumes the longest one."""
    return size - int(parameters[ANSWER_BOUND]) + length_of(answer) if generates(model) else size


_Bin = Annotated[int, msgspec.Meta(ge=0, le=_LAST)]
_decode = msgspec.json.Decoder(dict[_Bin, Annotated[float, msgspec.Meta(ge=0)]]).decode

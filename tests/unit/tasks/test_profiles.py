import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.document import Size
from tasks.models.folder import load_catalogue
from tasks.models.model import Model, Profile, Variant
from tasks.models.profiles import (
    UNSURE,
    DeviceProfile,
    KnownProfile,
    Measurement,
    Point,
    Processor,
    ProfileError,
    Residuals,
    load_book,
    make_book,
    parse_profile,
    profile_path,
    render_profile,
)
from tasks.settings import TREE
from tests.builders import a_text_model, recorded
from workers.profiling.measure import MeasuredOutcome, write

DEFAULT = Profile(base=0.5, slope=0.01, load=3.0)
MODEL = a_text_model(fast=Variant(runtime="onnx", memory=Size(7), profiles={"cpu": DEFAULT}))
FILE = parse_profile(recorded("documents/measured.yaml"))
MEASURED = FILE.variants["fast"]
seconds = st.floats(1e-6, 1e4)
ratios = st.floats(0.01, 100)
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
measurements = st.builds(
    Measurement,
    date=st.dates(datetime.date(1000, 1, 1)).map(str),
    packages=st.dictionaries(st.from_regex(r"[a-z][a-z0-9-]{0,9}", fullmatch=True), texts, max_size=2),
    load=seconds,
    memory=st.integers(0, 2**40).map(Size),
    peak=st.integers(0, 2**40).map(Size),
    base=seconds,
    step=seconds,
    slope=seconds,
    floor=seconds,
    residual=st.builds(Residuals, p50=ratios, p90=ratios, p95=ratios, p99=ratios),
    disturbed=st.floats(0, 1),
    points=st.lists(st.builds(Point, st.integers(1, 999), st.floats(0.5, 1e6), seconds), max_size=3).map(tuple),
)
files = st.builds(
    DeviceProfile,
    model=st.sampled_from(["sentiment:1", "sentiment:2", "embed:1"]),
    device=st.builds(Processor, kind=st.sampled_from(["cpu", "cuda"]), name=st.sampled_from(["EPYC", "Xeon", "L4"])),
    source=st.sampled_from(["measured", "derived"]),
    rows=st.lists(texts, min_size=1, max_size=2).map(tuple),
    assumed=st.lists(texts, max_size=2).map(tuple),
    variants=st.dictionaries(st.sampled_from(["fast", "exact"]), measurements, min_size=1),
)


def changed(**fields: Any) -> DeviceProfile:
    return msgspec.structs.replace(FILE, variants={"fast": msgspec.structs.replace(MEASURED, **fields)})


@pytest.mark.cases("old, new, message")
def test_what_is_wrong_in_a_profile_is_named_by_its_path(old: str, new: str, message: str) -> None:
    text = render_profile(FILE)
    assert old in text
    with pytest.raises(ProfileError) as wrong:
        parse_profile(text.replace(old, new), "cpu.yaml")
    assert f"cpu.yaml: {message}" in str(wrong.value)


OWN = Profile(base=0.002, slope=0.0001, floor=0.003, load=0.2)
LOOKUPS: dict[str, tuple[list[DeviceProfile], Model, str, str, KnownProfile]] = {
    "of the very device": ([FILE], MODEL, "cpu", "EPYC", KnownProfile(OWN, 1.2, 300)),
    "of another device": (
        *([FILE], MODEL, "cpu", "Xeon"),
        KnownProfile(OWN, UNSURE, 300, "no profile of 'Xeon': that of 'EPYC'"),
    ),
    "of none": (
        *([], MODEL, "cpu", "EPYC"),
        KnownProfile(DEFAULT, UNSURE, 7, "no profile of 'EPYC': model.yaml's default for cpu"),
    ),
    "of an older version": (
        *([FILE], msgspec.structs.replace(MODEL, version=2), "cpu", "EPYC"),
        KnownProfile(DEFAULT, UNSURE, 7, "no profile of 'EPYC': model.yaml's default for cpu"),
    ),
}


@pytest.mark.parametrize(("files", "model", "kind", "device", "expected"), LOOKUPS.values(), ids=LOOKUPS)
def test_a_variant_has_the_profile_of_its_device_else_another_with_a_warning(
    files: list[DeviceProfile], model: Model, kind: Any, device: str, expected: KnownProfile
) -> None:
    assert make_book(files).lookup(model, "fast", kind, device) == expected
    nothing = make_book(files).lookup(model, "fast", "tpu", "")
    assert (nothing.profile, "any tpu device" in str(nothing.warning)) == (DEFAULT, True)


def test_a_derived_profile_says_so_and_gives_way_to_a_measured_one() -> None:
    derived = msgspec.structs.replace(changed(base=9.0), source="derived", rows=("a row",))
    assert "derived from public figures" in str(make_book([derived]).lookup(MODEL, "fast", "cpu", "EPYC").warning)
    other = msgspec.structs.replace(FILE, device=Processor(kind="cpu", name="Xeon"))
    assert make_book([derived, other]).lookup(MODEL, "fast", "cpu", "Ampere").profile.base == 0.002


several = st.lists(files, max_size=4, unique_by=lambda f: (f.device.name, f.device.kind, f.model))


@given(several, st.sampled_from(["cpu", "cuda", "tpu"]), texts, st.data())
def test_a_lookup_always_answers_in_any_order_of_files_and_doubts_nothing_but_a_measurement(
    found: list[DeviceProfile], kind: Any, name: str, data: st.DataObject
) -> None:
    known = make_book(found).lookup(MODEL, "fast", kind, name)
    assert make_book(data.draw(st.permutations(found))).lookup(MODEL, "fast", kind, name) == known
    assert known.profile.latency(1, 1) >= 0
    assert known.residual >= 1
    own = [f for f in found if f.device.name == name and f.device.kind == kind and "fast" in f.variants]
    if known.warning is None:
        assert any(f.source == "measured" and f.model == "sentiment:1" for f in own)
    else:
        assert known.residual >= UNSURE


def test_a_broken_file_is_reported_and_the_others_are_read(tmp_path: Path) -> None:
    good = profile_path(tmp_path, FILE.model, FILE.device)
    good.parent.mkdir(parents=True)
    good.write_text(render_profile(FILE))
    (good.parent / "other.yaml").write_text("model: [")
    (tmp_path / "embed" / "profiles").mkdir(parents=True)
    (tmp_path / "embed" / "profiles" / "cpu.yaml").write_text(render_profile(FILE))
    read, errors = load_book(tmp_path)
    assert read.lookup(MODEL, "fast", "cpu", "EPYC").warning is None
    assert ["embed" in str(e) for e in errors] == [True, False]
    assert "a version of the folder's model 'embed'" in str(errors[0])


def test_every_profile_that_is_shipped_can_be_read_and_fits_its_model() -> None:
    catalogue = load_catalogue(TREE / "models")
    _, errors = load_book(TREE / "models")
    assert errors == ()
    for path in (TREE / "models").glob("*/profiles/*.yaml"):
        file = parse_profile(path.read_text(), str(path))
        assert file.variants.keys() <= catalogue.models[file.model].variants.keys()
        assert path == profile_path(TREE / "models", file.model, file.device)


def test_measuring_one_variant_again_keeps_the_others(tmp_path: Path) -> None:
    exact = msgspec.structs.replace(MEASURED, base=1.0)
    again = msgspec.structs.replace(MEASURED, base=2.0)

    def written(model: str, **measured: Measurement) -> dict[str, Measurement]:
        found = [MeasuredOutcome(model=model, variant=name, measurement=one) for name, one in measured.items()]
        (path,) = write(found, FILE.device, tmp_path)
        return dict(parse_profile(path.read_text()).variants)

    assert write([MeasuredOutcome(model="sentiment:1", variant="fast", error="no")], FILE.device, tmp_path) == []
    assert list(tmp_path.iterdir()) == [], "a failed variant writes no file"
    written("sentiment:1", fast=MEASURED, exact=exact)
    assert written("sentiment:1", fast=again) == {"fast": again, "exact": exact}
    assert written("sentiment:2", fast=again) == {"fast": again}

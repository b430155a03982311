"""The pages as data: links lead somewhere, and the tests that pages name exist."""

import ast
import re
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

import taxiway
from docs.reference import PAGE, reference
from docs.site import api
from tasks.settings import TREE

PAGES = [
    TREE / "README.md",
    TREE / "CHANGELOG.md",
    TREE / "CONTRIBUTING.md",
    TREE / "CODE_OF_CONDUCT.md",
    TREE / "SECURITY.md",
    TREE / "docker" / "README.md",
    TREE / "benchmarks" / "README.md",
    TREE / "lab" / "README.md",
    *sorted((TREE / "docs").rglob("*.md")),
]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
NAMED_TEST = re.compile(r"`((?:unit|integration|acceptance)/(?:\w+/)*test_\w+\.py)::(test_\w+)`")
TOPS = "api|router|workers|tasks|broker|local|simulator|controller|benchmarks|lab"
MODULE = re.compile(rf"(?:`|python -m )((?:{TOPS})(?:\.\w+)+)(?![\w./])")
TEST = re.compile(r"^(?:async )?def (test_\w+)", re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(TREE).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        repeats = sum(1 for known in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known))
        found.add(f"{slug}-{repeats}" if repeats else slug)
    return found


def broken(page: Path, link: str) -> bool:
    """Whether a relative link leads to no file, or to no heading of its page."""
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    return not target.exists() or bool(anchor and target.suffix == ".md" and anchor not in anchors(target))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_file_and_its_heading(page: Path) -> None:
    links = LINK.findall(CODE.sub("", page.read_text(encoding="utf-8")))
    assert [link for link in links if "://" not in link and broken(page, link)] == []


@cache
def known_tests() -> set[tuple[str, str]]:
    """Every test: its file, relative to `tests/`, and its name."""
    files = sorted((TREE / "tests").rglob("test_*.py"))
    found = {
        path.relative_to(TREE / "tests").as_posix(): TEST.findall(path.read_text(encoding="utf-8")) for path in files
    }
    return {(file, name) for file, names in found.items() for name in names}


def test_the_table_of_celery_features_names_a_test_that_exists_in_every_row() -> None:
    page = (TREE / "docs" / "celery.md").read_text(encoding="utf-8")
    rows = [line for line in page.partition("| Celery feature |")[2].splitlines()[2:] if line.startswith("|")]
    unproven = [row for row in rows if not NAMED_TEST.search(row) and "not tested" not in row]
    missing = {named for row in rows for named in NAMED_TEST.findall(row)} - known_tests()
    assert rows
    assert (unproven, missing) == ([], set())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_test_that_a_page_names_by_its_beginning_exists(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")))
    assert [name for name in named if not any(known.startswith(name) for _, known in known_tests())] == []


def is_there(name: str) -> bool:
    """Whether a path, or a dotted name of a module or of what stands in one, is in the tree."""
    if "/" in name:
        return (TREE / name).exists()
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        folder = TREE.joinpath(*parts[:length])
        module = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        if module.is_file():
            text = module.read_text(encoding="utf-8")
            return all(re.search(rf"\b{part}\b", text) for part in parts[length:])
    return False


@pytest.mark.parametrize("page", [page for page in PAGES if page != PAGE], ids=name_of)
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:\w+/)+[a-z_]\w*\.(?:py|lua))`", text)
    names = MODULE.findall(text)
    tests = [path for path in paths if path.startswith(("unit/", "integration/", "acceptance/"))]
    missing = [path for path in tests if not is_there(f"tests/{path}")]
    assert missing + [name for name in {*paths, *names} - {*tests} if not is_there(name)] == []


def test_every_module_that_a_docstring_names_exists() -> None:
    sources = [path for top in TOPS.split("|") for path in (TREE / top).rglob("*.py")]
    named = {(path.relative_to(TREE), name) for path in sources for name in MODULE.findall(path.read_text("utf-8"))}
    assert len(named) > 50
    assert sorted((str(path), name) for path, name in named if not is_there(name)) == []


ARCHITECTURE = TREE / "docs" / "architecture.md"


def section(heading: str) -> str:
    """The text of a section of the architecture page."""
    return ARCHITECTURE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]


def test_a_requests_walk_passes_at_most_35_files() -> None:
    files = set(re.findall(r"`([\w/]+\.(?:py|lua))`", section("A request's walk")))
    assert 20 < len(files) <= 35


def test_the_glossary_has_at_most_40_words() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ", section("Glossary"), re.MULTILINE)[2:]
    assert 10 < sum(len(re.split(r"[,:]", row)) for row in rows) <= 40


def test_the_reference_is_what_the_sources_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: make reference"


def test_a_public_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for path in (path for top in (*TOPS.split("|")[:-2], "taxiway") for path in (TREE / top).rglob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(TREE)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_the_recording_shows_a_fleet_that_starts_answers_and_explains() -> None:
    recording = (TREE / "docs" / "recording.svg").read_bytes()
    texts = " ".join(ElementTree.fromstring(recording).itertext())
    assert len(recording) < 300_000
    for shown in ("taxiway up", "Bullmastiff", "cheapest that meets", "considered, cheapest first", "taxiway top"):
        assert shown in texts


def test_the_site_has_every_page_in_its_navigation() -> None:
    named = set(re.findall(r": ([\w/.-]+\.md)$", (TREE / "mkdocs.yml").read_text("utf-8"), re.MULTILINE))
    pages = {name_of(page) for page in PAGES if page.parent.name != "decisions"} | {"docs/decisions/README.md"}

    assert named - {"docs/api.md"} == pages, "a page is missing in the nav of mkdocs.yml"


def test_the_site_has_a_topic_for_all_that_taxiway_exports() -> None:
    page = api()
    assert [name for name in taxiway.__all__ if f".{name}\n" not in page] == []

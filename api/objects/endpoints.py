"""OpenAI's files and batches at their paths."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

import msgspec
from litestar import Response, get
from litestar.openapi.spec import Operation
from litestar.params import Parameter
from litestar.response import Stream
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from api.described import deletes, openai_answers, posts, takes
from api.gate import AnyRequest, json_answer, needs, take_terms
from api.objects.batches import REFUSED_TERMS, Batch, BatchCall, check_endpoint, decode_batch, window_of
from api.openai.requests import read_fields
from api.services import router_of, services_of, tenant_of
from api.storage.objects import (
    Contents,
    Deleted,
    ExpiresAfter,
    FileRecord,
    Page,
    bounded,
    decode_file,
    file_path,
    new_name,
    owner_of,
    page_of,
)
from api.terms import HEADERS, terms_in
from router.decide.classify import service_of
from tasks.queues.locality import joined, missing
from taxiway.contract.batches import ENDED, BatchAnswer, Counts, Errors
from taxiway.contract.request import parse_terms
from taxiway.contract.tensors import OCTETS
from taxiway.errors import (
    FleetUnavailable,
    InvalidRequestError,
    UnknownObjectError,
    UnplaceableError,
    cut,
    quoted,
    unreadable,
    wrong_field,
)

LISTED_FILES = 1000
"""Files in one list, unless more are asked for."""

PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "vision", "evals")

_Files = Annotated[int, Parameter(description="Files per page.", ge=1, le=10_000)]
_Batches = Annotated[int, Parameter(description="Batches per page.", ge=1, le=100)]
_After = Annotated[str, Parameter(description="The id of the last object of the previous page.")]
_Purpose = Annotated[str, Parameter(description="Only files of this purpose.")]
_Order = Annotated[Literal["asc", "desc"], Parameter(description="By creation.")]


class FileAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A file, as OpenAI describes it. Times are Unix seconds."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


def file_answer(record: FileRecord) -> FileAnswer:
    """A file in an answer."""
    return msgspec.convert(record, FileAnswer, from_attributes=True)


def batch_answer(batch: Batch) -> BatchAnswer:
    """A batch in an answer."""
    known: dict[str, Any] = {name: getattr(batch, name) or None for name in _ALIKE}
    known |= {f"{status}_at": batch.ended_at if batch.status == status else None for status in _ENDS}
    return BatchAnswer(
        errors=Errors(data=batch.errors) if batch.errors else None,
        request_counts=Counts(batch.lines, batch.completed, batch.failed),
        metadata=batch.metadata,
        **known,
    )


_ALIKE = (
    *("id", "endpoint", "input_file_id", "completion_window", "status", "output_file_id", "error_file_id"),
    *("created_at", "in_progress_at", "expires_at", "finalizing_at", "cancelling_at"),
)
_ENDS = ("completed", "failed", "expired", "cancelled")

_BATCH_HEADERS = {name: its.meaning for name, its in HEADERS.items() if its.term not in REFUSED_TERMS}


class FileOperation(Operation):
    """Describes an upload."""

    def to_schema(self) -> dict[str, Any]:
        """The operation with its form."""
        fields = {"purpose": {"type": "string"}, "file": {"type": "string", "format": "binary"}}
        expiry = {"expires_after[anchor]": {"const": "created_at"}, "expires_after[seconds]": {"type": "integer"}}
        form = {"type": "object", "properties": {**fields, **expiry}, "required": [*fields]}
        content = {"multipart/form-data": {"schema": form}}
        return {**super().to_schema(), "requestBody": {"required": True, "content": content}}


@posts(
    "/v1/files",
    opt=needs("submit"),
    responses=openai_answers(FileAnswer, 400, 404, 413, 415, 503),
    operation_class=FileOperation,
    request_max_body_size=None,
)
async def upload(request: AnyRequest) -> Response[bytes]:
    """Upload a file, as `multipart/form-data`."""
    stored = services_of(request)
    form, name, now = _Form(request), new_name("file-"), stored.router.store.clock.stored_now()
    await form.begin()
    await stored.objects.expect_content(name, now)
    async with _deleted_on_error(stored.contents, name):
        record = await _written(request, form, name)
        await stored.objects.add_file(record, now)
    return json_answer(file_answer(record))


@contextlib.asynccontextmanager
async def _deleted_on_error(contents: Contents, name: str) -> AsyncIterator[None]:
    """Delete a file's content if its upload fails, also by a client that left."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            await contents.delete(file_path(name))
        if not isinstance(error, OSError):
            raise
        message = f"the router cannot write files where --files says: {error.strerror or error}"
        raise FleetUnavailable(message, retry_after=5.0) from error


async def _written(request: AnyRequest, form: _Form, name: str) -> FileRecord:
    """The file in a form, once its content is written."""
    stored, tenant = services_of(request), owner_of(tenant_of(request))
    now, room = int(stored.router.store.clock.stored_now()), await stored.objects.room(tenant)
    most = (stored.limit, "file") if stored.limit <= room else (room, "files")
    size = await stored.contents.write(file_path(name), bounded(form.content(), *most))
    purpose = await form.end()
    return FileRecord(
        id=name,
        tenant=tenant,
        bytes=size,
        created_at=now,
        filename=form.filename,
        purpose=purpose,
        expires_at=form.expires(now),
    )


@get("/v1/files", opt=needs("read"), responses=openai_answers(Page, 400, 503))
async def files(
    request: AnyRequest,
    limit: _Files = LISTED_FILES,
    after: _After = "",
    order: _Order = "desc",
    purpose: _Purpose = "",
) -> Response[bytes]:
    """The caller's files, latest first."""
    objects, owner = services_of(request).objects, owner_of(tenant_of(request))
    records: list[FileRecord] = []
    more = True
    while more and len(records) <= limit:  # some of what is stored is not listed
        raw, more = await objects.page("file", owner, after=after, most=LISTED_FILES, latest_first=order == "desc")
        found = [decode_file(one) for one in raw]
        records += [one for one in found if purpose in ("", one.purpose) and not _is_over(request, one)]
        after = found[-1].id if found else after
    answers = [file_answer(record) for record in records[:limit]]
    return json_answer(page_of(answers, more or len(records) > limit))


@get("/v1/files/{file:str}", opt=needs("read"), responses=openai_answers(FileAnswer, 404, 503))
async def file(request: AnyRequest, file: str) -> Response[bytes]:
    """What is known of a file."""
    return json_answer(file_answer(await _file(request, file)))


@deletes("/v1/files/{file:str}", opt=needs("submit"), responses=openai_answers(Deleted, 404, 503))
async def file_delete(request: AnyRequest, file: str) -> Response[bytes]:
    """Delete a file."""
    stored, record = services_of(request), await _file(request, file)
    await stored.objects.delete("file", file, record.tenant, record.bytes)
    await stored.contents.delete(file_path(file))
    return json_answer(Deleted(id=file, object="file"))


@get("/v1/files/{file:str}/content", opt=needs("read"), responses=openai_answers(bytes, 404, 503, media=OCTETS))
async def file_content(request: AnyRequest, file: str) -> Stream:
    """A file's content."""
    record = await _file(request, file)
    gone = UnknownObjectError(f"the content of {quoted(file)} is gone", file=file)
    return await _content(request, file_path(file), gone, {"content-length": str(record.bytes)})


async def _content(
    request: AnyRequest, path: str, gone: UnknownObjectError, headers: Mapping[str, str] | None = None
) -> Stream:
    """The content under a path; raises `gone` if nothing is there."""
    pieces = services_of(request).contents.read(path)
    try:
        first = await anext(pieces, b"")
    except FileNotFoundError as error:
        raise gone from error

    async def all_pieces() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return Stream(all_pieces(), media_type="application/octet-stream", headers=headers)


@posts(
    "/v1/batches",
    opt=needs("submit"),
    operation_class=takes(BatchCall, _BATCH_HEADERS),
    responses=openai_answers(BatchAnswer, 400, 404, 413, 415, 503),
)
async def batch_create(request: AnyRequest) -> Response[bytes]:
    """Run the calls in a file."""
    fields, call = read_fields(await request.body(), BatchCall, 10_000)
    seconds = window_of(call.completion_window)
    check_endpoint(call.endpoint, router_of(request).rules)
    stored, record = services_of(request), await _file(request, call.input_file_id)
    terms = _terms(request, fields)
    webhook = terms.pop("webhook", None)
    stored.router.rules.webhooks.notified("batch", record.tenant, webhook)  # it must be there
    await stored.objects.room(record.tenant)  # its output must have some
    now = stored.router.store.clock.stored_now()
    batch = Batch(
        id=new_name("batch_"),
        tenant=record.tenant,
        endpoint=call.endpoint,
        input_file_id=record.id,
        completion_window=call.completion_window,
        created_at=int(now),
        expires_at=int(now) + seconds,
        metadata=call.metadata,
        webhook=webhook,
        terms=terms,
        output_expires_after=call.output_expires_after,
    )
    await stored.objects.add_batch(batch.id, batch.tenant, batch, now)
    stored.runner.wake()
    return json_answer(batch_answer(batch))


@get("/v1/batches", opt=needs("read"), responses=openai_answers(Page, 400, 503))
async def batches(request: AnyRequest, limit: _Batches = 20, after: _After = "") -> Response[bytes]:
    """The caller's batches, latest first."""
    found, more = await services_of(request).objects.page(
        "batch", owner_of(tenant_of(request)), after=after, most=limit, latest_first=True
    )
    return json_answer(page_of([batch_answer(decode_batch(raw)) for raw in found], more))


@get("/v1/batches/{batch:str}", opt=needs("read"), responses=openai_answers(BatchAnswer, 404, 503))
async def batch(request: AnyRequest, batch: str) -> Response[bytes]:
    """A batch's state, and how many of its lines are answered."""
    return json_answer(batch_answer(await _batch(request, batch)))


@get(
    "/v1/batches/{batch:str}/parts/{number:int}",
    opt=needs("read"),
    responses=openai_answers(bytes, 404, 503, media=OCTETS),
)
async def batch_part(request: AnyRequest, batch: str, number: int) -> Stream:
    """Lines that have ended, while the batch goes on: part `number` from 0, in the order of the input.

    All are in the batch's files once it has ended; then it has no parts.
    """
    gone = UnknownObjectError(f"{quoted(batch)} has no part {number} now", batch=batch)
    parts = (await _batch(request, batch)).parts
    if not 0 <= number < len(parts):
        raise gone
    return await _content(request, parts[number], gone)


async def _batch(request: AnyRequest, batch: str) -> Batch:
    return decode_batch(await services_of(request).objects.get("batch", batch, tenant_of(request)))


@posts("/v1/batches/{batch:str}/cancel", opt=needs("submit"), responses=openai_answers(BatchAnswer, 404, 503))
async def batch_cancel(request: AnyRequest, batch: str) -> Response[bytes]:
    """Cancel a batch: its answers so far are kept. A batch that has ended is left unchanged."""
    stored = services_of(request)
    now = int(stored.router.store.clock.stored_now())

    def cancel(raw: bytes) -> Batch:
        found = decode_batch(raw)
        if found.status in ENDED or found.status == "finalizing" or found.cancelled:
            return found
        return msgspec.structs.replace(found, status="cancelling", cancelling_at=now)

    raw = await stored.objects.change("batch", batch, tenant_of(request), cancel)
    stored.runner.wake()
    return json_answer(batch_answer(decode_batch(raw)))


@deletes("/v1/batches/{batch:str}", opt=needs("submit"), responses=openai_answers(Deleted, 400, 404, 503))
async def batch_delete(request: AnyRequest, batch: str) -> Response[bytes]:
    """Delete a batch that has ended; its files stay."""
    objects, found = services_of(request).objects, await _batch(request, batch)
    if found.status not in ENDED:
        raise wrong_field("batch_id", "a batch that has ended: cancel it first", found.status)
    await objects.delete("batch", batch, found.tenant)
    return json_answer(Deleted(id=batch, object="batch"))


_EXPIRY = ("anchor", "seconds")
_FORM = 2**16
"""Most bytes of a form besides its file."""


class _Form:
    """A form with the fields `purpose` and `file`, in any order; only the file may be large."""

    def __init__(self, request: AnyRequest) -> None:
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        if kind != "multipart/form-data" or not options.get("boundary"):
            raise InvalidRequestError("body: expected multipart/form-data", field="body")
        self.filename = ""
        self._parser = PushMultipartParser(options["boundary"], max_segment_count=16)
        self._stream = request.stream()
        self._events = self._parsed()
        self._fields: dict[str, bytes] = {}

    async def begin(self) -> None:
        """Read up to the file."""
        await self._read_fields()
        if not self.filename:
            raise InvalidRequestError("file: expected a file with a name", field="file")

    async def content(self) -> AsyncIterator[bytes]:
        """The file's content."""
        async for event in self._events:
            if event is None:
                return
            if not isinstance(event, MultipartSegment):
                yield bytes(event)

    async def end(self) -> str:
        """Read what follows the file; the purpose, which may have come before it."""
        filename = self.filename
        await self._read_fields()
        self.filename = filename
        purpose = self._fields.get("purpose", b"").decode(errors="replace")
        if purpose not in PURPOSES:
            raise wrong_field("purpose", f"one of {list(PURPOSES)}", purpose)
        return purpose

    def expires(self, now: int) -> int | None:
        """When the file expires, if it does; all fields must have been read."""
        given = {key: self._fields.get(f"expires_after[{key}]", b"").decode(errors="replace") for key in _EXPIRY}
        if not any(given.values()):
            return None
        try:
            return now + msgspec.convert(given, ExpiresAfter, strict=False).seconds
        except msgspec.ValidationError as error:
            raise unreadable(error, "expires_after") from error

    async def _read_fields(self) -> None:
        """Read fields up to the file, or to the end."""
        name = ""
        async for event in self._events:
            if isinstance(event, MultipartSegment):
                name = event.name or ""
                if name == "file":
                    self.filename = cut(event.filename or "file", 255)
                    return
            elif event is not None:
                self._fields[name] = self._fields.get(name, b"") + bytes(event)
                if sum(map(len, self._fields.values())) > _FORM:
                    raise InvalidRequestError("body: the fields besides the file are too large", field="body")

    async def _parsed(self) -> AsyncIterator[MultipartSegment | bytearray | None]:
        """A segment's head, the pieces of its content, and None at its end, for each segment."""
        try:
            async for chunk in self._stream:
                for event in self._parser.parse(chunk):
                    yield event
            for event in self._parser.parse(b""):
                yield event
        except (MultipartError, ValueError) as error:
            raise InvalidRequestError(f"body: expected multipart/form-data: {error}", field="body") from error


def _terms(request: AnyRequest, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The service terms of a batch, under which some class could run something.

    Raises:
        InvalidRequestError: one is invalid, or a batch does not have it.
        UnplaceableError: no class has the labels of the terms and of their tenant.
    """
    given = terms_in(fields)
    take_terms(request.scope, given, REFUSED_TERMS)
    topology = router_of(request).rules.topology
    terms = parse_terms(given)
    service_of(terms, topology)
    locality = joined(terms.locality, topology.rules_of(terms.tenant).locality)
    if all(missing(locality, one.labels) for one in topology.hardware.values()):
        raise UnplaceableError(f"the data must stay on {locality!r}, which no hardware class is")
    owner = owner_of(tenant_of(request))
    if (tenant := given.pop("tenant", owner)) != owner:
        raise wrong_field("tenant", f"{owner!r}, which owns this caller's files", tenant)
    return given


async def _file(request: AnyRequest, name: str) -> FileRecord:
    """A file of the caller's that has not expired."""
    record = decode_file(await services_of(request).objects.get("file", name, tenant_of(request)))
    if _is_over(request, record):
        raise UnknownObjectError(f"file {quoted(name)} has expired", file=name)
    return record


def _is_over(request: AnyRequest, record: FileRecord) -> bool:
    return record.expires_at is not None and record.expires_at <= router_of(request).store.clock.now()

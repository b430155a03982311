"""Runs batches: every router takes those without an owner, and runs their lines as jobs, a window at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any

import msgspec

from broker.port import beside
from router.http.inference import Inference
from router.http.openai.answers import AnyCall, Head, written
from router.http.openai.batches import (
    ENDED,
    KINDS,
    MOST_ERRORS,
    MOST_LINES,
    PART,
    Batch,
    Ended,
    Line,
    LineError,
    answered,
    decode_batch,
    digest_of,
    key_of,
    lines_of,
    read_line,
    too_late,
)
from router.http.openai.calls import awaited
from router.http.openai.errors import JOB, code_of, content, param_of
from router.http.openai.objects import Contents, FileRecord, Objects, file_path, one_piece
from router.http.openai.requests import read_call, service_of, tier_for_later, tier_of, unsupported
from router.service.arrivals import Router
from tasks.models.model import Model
from taxiway.contract.job import Result, is_answer
from taxiway.contract.request import Request, parse_request
from taxiway.errors import (
    BrokerUnavailableError,
    DeadlineExceededError,
    FleetUnavailable,
    RequestTooLargeError,
    ResultExpiredError,
    TaxiwayError,
    UnknownObjectError,
    quoted,
    wrong_field,
)

logger = logging.getLogger(__name__)

WINDOW = 128
"""Lines of a batch whose jobs are in the fleet at the same time."""

LEASE = 10.0
"""Seconds after which another router takes over a batch whose owner is silent."""

_LOOK = 0.5  # seconds between two checks for batches
_RENEW = 2.0  # seconds between two renewals
_FLUSH = 10.0  # seconds after which a part is written even if it is short
_TOGETHER = 32  # lines that are read, or begin, in one turn of the event loop: some milliseconds for live calls
_AT_ONCE = 4  # batches that one router works on
_PAUSE = (0.2, 5.0)  # seconds before a refused line is retried: first, longest


_Window = deque[asyncio.Task[Ended]]


class _LostError(Exception):
    """Another router owns the batch now."""


class BatchRunner:
    """Works on the open batches."""

    def __init__(self, router: Router, inference: Inference, objects: Objects, contents: Contents) -> None:
        self._router = router
        self._inference = inference
        self._objects = objects
        self._contents = contents
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Signal that there is a new batch, or one to be cancelled."""
        self._woken.set()

    async def run(self) -> None:
        """Work until cancelled; another router continues what this one leaves."""
        try:
            while True:
                with contextlib.suppress(FleetUnavailable):
                    await self._look()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), _LOOK)
                self._woken.clear()
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _look(self) -> None:
        self._tasks = {name: task for name, task in self._tasks.items() if not task.done()}
        if self._router.leaving:
            return
        for name, tenant in await self._objects.open_batches():
            if name not in self._tasks and len(self._tasks) < _AT_ONCE:
                self._tasks[name] = asyncio.create_task(self._work(name, tenant))

    async def _work(self, name: str, tenant: str) -> None:
        try:
            work = await _Work.taken(name, tenant, self._router, self._inference, self._objects, self._contents)
            if work is not None:
                await work.run()
        except (_LostError, FleetUnavailable) as error:
            logger.info("batch left", extra={"batch": name, "error": str(error)})
        except Exception:  # another attempt follows once the lease is over
            logger.exception("batch failed", extra={"batch": name})
            await asyncio.sleep(LEASE)


class _Work:
    """This router's work on one batch."""

    def __init__(self, raw: bytes, router: Router, inference: Inference, objects: Objects, contents: Contents) -> None:
        self._raw = raw
        self._router = router
        self._inference = inference
        self._objects = objects
        self._contents = contents
        self._writing = asyncio.Lock()
        self._jobs: set[str] = set()  # that run now
        self._flushed = 0.0
        self.batch = decode_batch(raw)

    @classmethod
    async def taken(
        cls, name: str, tenant: str, router: Router, inference: Inference, objects: Objects, contents: Contents
    ) -> _Work | None:
        """The work on a batch, unless another router works on it."""
        try:
            raw = await objects.get("batch", name, None)
        except UnknownObjectError:  # deleted
            await objects.close_batch(name, tenant, router.store.now())
            return None
        batch = decode_batch(raw)
        if batch.status in ENDED:
            await _close(batch, router, objects)
            return None
        if batch.owner and batch.lease > router.store.now():
            return None
        work = cls(raw, router, inference, objects, contents)
        await work._change(owner=router.name)
        return work

    async def run(self) -> None:
        """Bring the batch to its end."""
        renewing = asyncio.create_task(self._renew())
        working = asyncio.create_task(self._steps())
        try:
            await asyncio.wait((renewing, working), return_when=asyncio.FIRST_COMPLETED)
            (renewing if renewing.done() else working).result()
        finally:
            for task in (working, renewing):
                task.cancel()
            await asyncio.gather(working, renewing, return_exceptions=True)
            await self._give_up()

    async def _steps(self) -> None:
        try:
            await self._advance()
        except FileNotFoundError:
            error = LineError("invalid_file", f"the content of {self.batch.input_file_id} is not there")
            await self._change(status="failed", errors=[error], ended_at=self._now())
        await _close(self.batch, self._router, self._objects)

    async def _advance(self) -> None:
        if self.batch.status == "validating":
            await self._validate()
        if self.batch.status == "in_progress":
            await self._run_lines()
        if self.batch.status in ("in_progress", "cancelling"):
            await self._change(status="finalizing", finalizing_at=self._now())
        if self.batch.status == "finalizing":
            await self._finish()

    async def _change(self, **fields: Any) -> None:
        """Change the batch. A concurrent cancellation is kept.

        Raises:
            _LostError: another router owns it.
        """
        async with self._writing:
            while True:
                lease = self._router.store.now() + LEASE
                changed = msgspec.structs.replace(self.batch, lease=lease, **fields)
                after = await self._objects.replace("batch", self.batch.id, self._raw, changed)
                if after is not None:
                    self._raw, self.batch = after, changed
                    return
                await self._take_over_changes()

    async def _take_over_changes(self) -> None:
        raw = await self._objects.get("batch", self.batch.id, None)
        batch = decode_batch(raw)
        if batch.owner != self.batch.owner:
            raise _LostError(f"{batch.owner} works on the batch")
        self._raw, self.batch = raw, batch

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(_RENEW)
            await self._change()

    async def _give_up(self) -> None:
        """Let another router take over at once."""
        with contextlib.suppress(_LostError, TaxiwayError):
            if self.batch.status not in ENDED:
                await self._change(owner="")

    def _now(self) -> int:
        return int(self._router.store.now())

    def _lines(self) -> AsyncIterator[tuple[int, bytes]]:
        content = self._contents.read(file_path(self.batch.input_file_id))
        return lines_of(content, int(self._router.rules.topology.limits.payload))

    async def _validate(self) -> None:
        """Read all lines once; one that is wrong fails the batch."""
        seen: set[bytes] = set()
        errors: list[LineError] = []
        lines = number = 0
        try:
            async for number, text in self._lines():
                lines += 1
                if error := await self._wrong(text, number, seen):
                    errors.append(error)
                if len(errors) >= MOST_ERRORS:
                    break
        except (RequestTooLargeError, FileNotFoundError) as error:
            errors.append(LineError("invalid_file", str(error), number + 1))
        if not lines and not errors:
            errors.append(LineError("invalid_file", f"expected 1 to {MOST_LINES} lines, got none", None))
        if errors:
            await self._change(status="failed", errors=errors, ended_at=self._now())
        else:
            await self._change(status="in_progress", lines=lines, in_progress_at=self._now())

    async def _wrong(self, text: bytes, number: int, seen: set[bytes]) -> LineError | None:
        if number % _TOGETHER == 0:
            await asyncio.sleep(0)
        try:
            line = read_line(text, self.batch.endpoint)
            digest = digest_of(line.custom_id)  # 50,000 ids of 512 characters take 100 MB
            if digest in seen:
                message = f"custom_id: {quoted(line.custom_id)} was used before"
                return LineError("duplicate_custom_id", message, number)
            seen.add(digest)
            await beside(len(text), self._request, line, "x", 1.0)
        except FleetUnavailable:
            return None  # the line is valid: when it runs, this error is its answer
        except TaxiwayError as error:
            return LineError(code_of(error), error.message, number, param_of(error, self.batch.endpoint))
        return None

    def _request(self, line: Line, key: str, left: float) -> tuple[AnyCall, Model, Request]:
        """A line's call and its model, and the request, due in `left` seconds."""
        rules = self._router.rules
        kind, fields = KINDS[self.batch.endpoint]
        parsed = read_call(bytes(line.body), kind, rules.topology.limits)
        if getattr(parsed.call, "stream", None):
            raise unsupported("stream", "nothing, as lines of a batch are not streamed", True)
        for name, value in parsed.terms.items():
            raise wrong_field(name, "no service term in a line, as all lines have their batch's", value)
        model = rules.catalogue.resolve(parsed.call.model)
        usual = {"service": service_of(tier_for_later(None, rules.topology), rules.topology)}
        own = {"tenant": self.batch.tenant, "deadline": left, "idempotency_key": key}
        return parsed.call, model, parse_request({**fields(parsed, model), **usual, **self.batch.terms, **own})

    async def _run_lines(self) -> None:
        """Run the lines that are in no part yet, in their order, a window at a time."""
        waiting: _Window = deque()
        part: list[Ended] = []
        self._flushed = asyncio.get_running_loop().time()
        try:
            await self._begin_lines(waiting, part)
            while waiting and not self.batch.cancelled:
                await self._take(waiting, part)
        finally:
            for task in waiting:
                task.cancel()
            ended = await asyncio.gather(*waiting, return_exceptions=True)
        part += [one for one in ended if isinstance(one, Ended)]
        await self._flush(part)
        if self._jobs:
            await self._router.store.cancel(sorted(self._jobs))

    async def _begin_lines(self, waiting: _Window, part: list[Ended]) -> None:
        """Begin each line once the window has room for it, until the batch is cancelled."""
        place = 0
        done = self.batch.done
        async for _, text in self._lines():
            place += 1
            if place <= done:
                continue
            while len(waiting) >= WINDOW or (waiting and waiting[0].done()):
                if self.batch.cancelled:
                    return
                await self._take(waiting, part)
            waiting.append(asyncio.create_task(self._answer(text)))
            if len(waiting) % _TOGETHER == 0:
                await asyncio.sleep(0)

    async def _take(self, waiting: _Window, part: list[Ended]) -> None:
        """Write a part if it is time to, then wait for the first line, and take it with all that ended after it.

        Lines that end together are replaced together: the next ones begin in one turn of the event loop, share a
        placement, and are forwarded in one call. A part is written once they have begun, so devices do not wait for it.
        """
        late = asyncio.get_running_loop().time() - self._flushed >= _FLUSH
        if len(part) >= PART or (part and late):
            await self._flush(part)
        await asyncio.wait((waiting[0],), timeout=_RENEW)
        while waiting and waiting[0].done():
            part.append(waiting.popleft().result())

    async def _flush(self, part: list[Ended]) -> None:
        """Write the lines as a part, then name it in the batch."""
        self._flushed = asyncio.get_running_loop().time()
        if not part:
            return
        number = len(self.batch.outputs) + len(self.batch.faults)
        names: dict[bool, list[str]] = {True: [], False: []}
        for completed in names:
            lines = [one.written for one in part if one.completed is completed]
            if lines:
                name = f"batches/{self.batch.id}/{number:06}-{self.batch.owner}-{'output' if completed else 'error'}"
                await self._contents.write(name, one_piece(b"".join(lines)))
                names[completed].append(name)
        batch = self.batch
        await self._change(
            done=batch.done + len(part),
            completed=batch.completed + sum(one.completed for one in part),
            failed=batch.failed + sum(not one.completed for one in part),
            expired=batch.expired + sum(one.expired for one in part),
            outputs=[*batch.outputs, *names[True]],
            faults=[*batch.faults, *names[False]],
        )
        part.clear()

    async def _answer(self, text: bytes) -> Ended:
        """Run one line until it is answered, or too late."""
        line = read_line(text, self.batch.endpoint)
        attempt, pauses = 0, count()
        while True:
            left = self.batch.expires_at - self._router.store.stored_now()  # equal for all that begin together
            if left <= 0:
                return Ended(too_late(line.custom_id), completed=False, expired=True)
            try:
                return await self._ask(line, key_of(self.batch.id, line.custom_id, attempt), left, pauses)
            except ResultExpiredError:  # it ended while no router worked on the batch, and nothing is left of it
                attempt += 1
            except DeadlineExceededError:
                return Ended(too_late(line.custom_id), completed=False, expired=True)
            except TaxiwayError as error:
                return self._failed(line, error)

    def _failed(self, line: Line, error: TaxiwayError) -> Ended:
        """The end of a line that has an error for its answer."""
        body = content(error, self.batch.endpoint)
        job = str(error.details.get(JOB, ""))
        return Ended(answered(line.custom_id, job, error.status, body), completed=False)

    async def _ask(self, line: Line, key: str, left: float, pauses: Iterator[int]) -> Ended:
        """The answer to a line; retried while the fleet does not accept it, or its answer cannot be read."""
        while True:
            size = len(bytes(line.body))
            try:
                call, model, request = await beside(size, self._request, line, key, left)
                job, result = await self._run(request, size)
                if isinstance(result, FleetUnavailable):
                    return self._failed(line, result)
                head = Head(job, tier_of(str(request.service), self._router.rules.topology), self._now())
                body = await beside(size, written, call, model, head, result)
                return Ended(answered(line.custom_id, job, 200, body), completed=True)
            except FleetUnavailable as error:
                left = self.batch.expires_at - self._router.store.now()
                if left <= 0:
                    raise DeadlineExceededError("the batch's window passed") from error
                first, longest = _PAUSE
                await asyncio.sleep(min(first * 2 ** min(next(pauses), 10), longest, left))

    async def _run(self, request: Request, size: int) -> tuple[str, Result | FleetUnavailable]:
        """The job of a request, and its result: also the fleet's error that it ended with, as its key has no other."""
        with contextlib.closing(await self._inference.run(request, size, notify=False)) as running:
            self._jobs.add(running.job)
            meta = None
            try:
                meta = await awaited(self._router, running)
                if meta is None:
                    raise BrokerUnavailableError("the router stops")
                self._jobs.discard(running.job)
                return running.job, await self._inference.result(meta)
            except TaxiwayError as error:
                error.details.setdefault(JOB, running.job)
                if isinstance(error, FleetUnavailable) and meta is not None and not is_answer(meta):
                    return running.job, error
                raise

    async def _finish(self) -> None:
        """Join the parts to the output and error files, and end the batch."""
        batch = self.batch
        outputs = await self._joined("output", batch.outputs)
        faults = await self._joined("error", batch.faults)
        status = "cancelled" if batch.cancelled else "expired" if batch.expired else "completed"
        await self._change(
            status=status, output_file_id=outputs, error_file_id=faults, ended_at=self._now(), outputs=[], faults=[]
        )
        await self._contents.delete_below(f"batches/{batch.id}/")

    async def _joined(self, kind: str, parts: list[str]) -> str:
        """The file that has these parts; empty if there are none."""
        if not parts:
            return ""
        name = f"file-{self.batch.id.removeprefix('batch_')}-{kind}"

        async def pieces() -> AsyncIterator[bytes]:
            for part in parts:
                async for piece in self._contents.read(part):
                    yield piece

        size = await self._contents.write(file_path(name), pieces())
        now, after = self._now(), self.batch.output_expires_after
        record = FileRecord(
            id=name,
            tenant=self.batch.tenant,
            bytes=size,
            created_at=now,
            expires_at=None if after is None else now + after.seconds,
            filename=f"{self.batch.id}_{kind}.jsonl",
            purpose="batch_output",
        )
        await self._objects.add_output(record, now)
        return name


async def _close(batch: Batch, router: Router, objects: Objects) -> None:
    """Announce a batch's end, then record it: a router that dies in between leaves both to another one."""
    await router.webhooks.announce("batch", batch.status, batch.id, batch.tenant, batch.webhook)
    await objects.close_batch(batch.id, batch.tenant, batch.ended_at)

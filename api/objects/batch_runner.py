"""Runs batches: every router takes those without an owner, and runs their lines as jobs, a window at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from itertools import count
from typing import Any

import msgspec

from api.access import Bodies
from api.inference.infer import Inference
from api.objects.batches import (
    MOST_ERRORS,
    MOST_LINES,
    PART,
    PART_BYTES,
    Batch,
    EndedLine,
    LineCall,
    LineWindow,
    OpenBatch,
    answered,
    decode_batch,
    digest_of,
    failure,
    key_of,
    lines_of,
    next_batches,
    read_line,
    read_line_call,
    too_late,
)
from api.openai.answers import AnswerHead
from api.openai.requests import service_of, tier_for_later, tier_of
from api.openai_errors import JOB, code_of, param_of
from api.storage.objects import Contents, FileRecord, Objects, file_path, one_piece
from tasks.ticket import job_id
from taxiway.backoff import Backoff
from taxiway.contract.batches import ENDED, Line, LineError
from taxiway.contract.job import Result, is_answer
from taxiway.contract.request import Request, Terms, parse_request
from taxiway.errors import (
    BrokerUnavailableError,
    DeadlineExceededError,
    FleetUnavailable,
    RequestTooLargeError,
    ResultExpiredError,
    TaxiwayError,
    UnknownObjectError,
    quoted,
)
from taxiway.running import beside, end, first_of

logger = logging.getLogger(__name__)

LINES_IN_FLEET = 128
"""Lines of a batch whose jobs are in the fleet at the same time."""

WINDOW_BYTES = 16 * 2**20
"""Bytes that those of all batches have together at one router, with their answers, which may be as long as the longest
one of their batch; while it handles a line, it takes several times them."""

BATCH_LEASE = 10.0
"""Seconds after which another router takes over a batch whose owner is silent."""

_CHECK_EVERY = 0.5  # seconds between two checks for batches
_RENEW_EVERY = 2.0  # seconds between two renewals
_FLUSH = 1.0  # seconds after which a part is written even if it is short; later ones wait longer
_LINES_A_TURN = 32  # lines that are read, or begin, in one turn of the event loop: some milliseconds for live calls
_ANSWER_BYTES = WINDOW_BYTES // LINES_IN_FLEET  # bytes that an answer is expected to have, until a batch has some
_BATCHES_AT_ONCE = 8  # batches that one router works on
_BACKOFF = Backoff(0.2, 5.0)  # before a refused line is retried

_Window = deque[asyncio.Task[EndedLine]]


class _LostError(Exception):
    """Another router owns the batch now."""


class BatchRunner:
    """Works on the open batches, of all tenants in turn. The bytes of running lines count as request bodies, too."""

    def __init__(self, inference: Inference, objects: Objects, contents: Contents, bodies: Bodies) -> None:
        self.router, self.inference, self.objects, self.contents = inference.router, inference, objects, contents
        self.lines = LineWindow(WINDOW_BYTES)
        self._bodies = bodies
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._works: dict[str, _Work] = {}  # of the tasks that have begun
        self._since: dict[str, float] = {}  # when the work on a batch began, or its wait
        self._later: dict[str, float] = {}  # when to look at a batch again that cannot be worked on
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Signal that there is a new batch, or one to be cancelled."""
        self._woken.set()

    def begins(self, tenant: str, size: int, expected: int) -> bool:
        """Whether a line may begin that has `size` bytes, and its answer as expected; it is counted until `ended`."""
        if not self.lines.fits(tenant, size + expected):
            return False
        try:
            self._bodies.take(tenant, size)
        except FleetUnavailable:
            return False
        self.lines.add(tenant, size + expected)
        return True

    def ended(self, tenant: str, size: int, expected: int, answer: int) -> None:
        """Count a line no more, but the bytes of its answer, until they are written."""
        self._bodies.give_back(tenant, size)
        self.lines.add(tenant, answer - size - expected)

    async def closed(self, batch: Batch) -> None:
        """Announce a batch's end, then record it: a router that dies in between leaves both to another one."""
        await self.contents.delete_below(f"batches/{batch.id}/")
        await self.router.registry.announce("batch", batch.status, batch.id, batch.tenant, batch.webhook)
        await self.objects.close_batch(batch.id, batch.tenant, batch.ended_at)

    async def run(self) -> None:
        """Work until cancelled; another router continues what this one leaves."""
        try:
            while True:
                with contextlib.suppress(FleetUnavailable):
                    await self._look()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), _CHECK_EVERY)
                self._woken.clear()
        finally:
            await end(self._tasks.values())

    async def _look(self) -> None:
        """Begin the work on those batches whose turn it is, and leave the others."""
        self._tasks = {name: task for name, task in self._tasks.items() if not task.done()}
        if self.router.leaving:
            return
        now = asyncio.get_running_loop().time()
        tenants = dict(await self.objects.open_batches())
        self._since = {name: self._since.get(name, now) for name in tenants}
        self._later = {name: until for name, until in self._later.items() if until > now and name in tenants}
        turns = await self._turns(tenants, now)
        self.lines.tenants = len({tenants[name] for name in turns})
        for name, raw in turns.items():
            if name not in self._tasks:
                self._since[name] = now
                self._tasks[name] = asyncio.create_task(self._work(name, raw))
        for name, task in self._tasks.items():
            if name in tenants and name not in turns:
                self._since[name] = now
                task.cancel()

    async def _turns(self, tenants: Mapping[str, str], now: float) -> dict[str, bytes]:
        """The batches whose turn it is, each as it is stored if the work on it is to begin; no other router has it."""
        read: dict[str, bytes] = {}
        while True:
            batches = [self._open(*one) for one in tenants.items() if one[0] not in self._later]
            turns = next_batches(batches, now, _BATCHES_AT_ONCE)
            for name in [name for name in turns if name not in self._tasks and name not in read]:
                read[name] = await self._free(name, tenants[name])
                if not read[name]:
                    self._later[name] = now + _RENEW_EVERY
            if all(read.get(name, b"-") for name in turns):
                return {name: read.get(name, b"") for name in turns}

    def _open(self, name: str, tenant: str) -> OpenBatch:
        work = self._works.get(name)
        loses = work is not None and work.batch.status in ("validating", "finalizing")
        return OpenBatch(name, tenant, name in self._tasks, self._since[name], loses)

    async def _free(self, name: str, tenant: str) -> bytes:
        """A batch as it is stored; empty if another router works on it, or it was deleted."""
        objects, now = self.objects, self.router.store.clock.now()
        try:
            raw = await objects.get("batch", name, None)
        except UnknownObjectError:
            await objects.close_batch(name, tenant, now)
            return b""
        held = decode_batch(raw)
        return b"" if held.owner not in ("", self.router.name) and held.lease > now else raw

    async def _work(self, name: str, raw: bytes) -> None:
        try:
            work = self._works[name] = _Work(raw, self)
            await work.run()
        except (_LostError, FleetUnavailable, UnknownObjectError) as error:
            logger.info("batch left", extra={"batch": name, "error": str(error)})
        except Exception:  # another attempt follows
            logger.exception("batch failed", extra={"batch": name})
            self._later[name] = asyncio.get_running_loop().time() + BATCH_LEASE
        finally:
            self._works.pop(name, None)


class _Work:
    """This router's work on one batch."""

    def __init__(self, raw: bytes, runner: BatchRunner) -> None:
        self._raw = raw
        self._runner = runner
        self._router, self._objects, self._contents = runner.router, runner.objects, runner.contents
        self._writing = asyncio.Lock()
        self._jobs: set[str] = set()  # that run now
        self._flushed = 0.0
        self._unwritten = 0  # bytes of answers
        self._largest = 0  # bytes of an answer
        self.batch = decode_batch(raw)

    async def run(self) -> None:
        """Bring the batch to its end, unless another router has it."""
        if self.batch.status in ENDED:  # its router died before it was closed
            await self._runner.closed(self.batch)
            return
        await self._change(owner=self._router.name)
        try:
            await first_of(self._renew(), self._steps())
        finally:
            await self._give_up()

    async def _steps(self) -> None:
        try:
            await self._advance()
        except FileNotFoundError:
            error = LineError("invalid_file", "the answers that were written are not there")
            await self._change(status="failed", errors=[error], ended_at=self._now())
        await self._runner.closed(self.batch)

    async def _advance(self) -> None:
        if self.batch.status == "validating":
            await self._validate()
        errors: list[LineError] = []
        if self.batch.status == "cancelling" and self.batch.in_progress_at:  # while no router worked on it
            with contextlib.suppress(FileNotFoundError):
                await self._cancel_begun()
        if self.batch.status == "in_progress":
            try:
                await self._run_lines()
            except FileNotFoundError:  # it was deleted: what is answered is kept
                error = f"the content of {self.batch.input_file_id} is not there; the output has the lines before"
                errors.append(LineError("invalid_file", error))
        if self.batch.status in ("in_progress", "cancelling"):
            await self._change(status="finalizing", errors=errors, finalizing_at=self._now())
        if self.batch.status == "finalizing":
            await self._finish()

    async def _change(self, **fields: Any) -> None:
        """Change the batch. A concurrent cancellation is kept.

        Raises:
            _LostError: another router owns it.
        """
        async with self._writing:
            while True:
                lease = self._router.store.clock.now() + BATCH_LEASE
                changed = msgspec.structs.replace(self.batch, lease=lease, **fields)
                after = await self._objects.replace("batch", self.batch.id, self._raw, changed)
                if after is not None:
                    self._raw, self.batch = after, changed
                    return
                raw = await self._objects.get("batch", self.batch.id, None)
                batch = decode_batch(raw)
                if batch.owner != self.batch.owner:
                    raise _LostError(f"{batch.owner} works on the batch")
                self._raw, self.batch = raw, batch

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_EVERY)
            await self._change()

    async def _give_up(self) -> None:
        """Let another router take over at once."""
        with contextlib.suppress(_LostError, TaxiwayError):
            if self.batch.status not in ENDED:
                await self._change(owner="")

    def _now(self) -> int:
        return int(self._router.store.clock.now())

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
        if number % _LINES_A_TURN == 0:
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

    def _request(self, line: Line, key: str, left: float) -> tuple[LineCall, Request]:
        """A line's call, and its request, due in `left` seconds."""
        rules = self._router.rules
        call = read_line_call(self.batch.endpoint, bytes(line.body), rules)
        usual = {"service": service_of(tier_for_later(None, rules.topology), rules.topology)}
        own = {"tenant": self.batch.tenant, "deadline": left, "idempotency_key": key}
        return call, parse_request({**call.fields, **usual, **self.batch.terms, **own})

    async def _run_lines(self) -> None:
        """Run the lines that are in no part yet, in their order, a window at a time."""
        waiting: _Window = deque()
        part: list[EndedLine] = []
        self._flushed = asyncio.get_running_loop().time()
        try:
            await self._begin_lines(waiting, part)
            while waiting and not self.batch.cancelled:
                await self._take(waiting, part)
            await self._end_lines(waiting, part)
        finally:
            await end(waiting)
            self._runner.lines.add(self.batch.tenant, -self._unwritten)
            self._unwritten = 0

    async def _end_lines(self, waiting: _Window, part: list[EndedLine]) -> None:
        """Cancel the lines that still run, and write those that have ended."""
        for task in waiting:
            task.cancel()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        part += [one for one in ended if isinstance(one, EndedLine)]
        await self._flush(part)
        if self._jobs:
            await self._router.store.jobs.cancel(sorted(self._jobs))

    async def _cancel_begun(self) -> None:
        """Cancel the jobs of lines that began before the batch lost its turn or its router, and are in no part."""
        place, jobs = 0, list[str]()
        secret = self._router.rules.secret[0]
        async for _, text in self._lines():
            place += 1
            if place > self.batch.done:
                key = key_of(self.batch.id, read_line(text, self.batch.endpoint).custom_id, 0)
                jobs.append(job_id(Terms(tenant=self.batch.tenant, idempotency_key=key), secret))
            if len(jobs) >= PART + LINES_IN_FLEET:  # no more begin before a part is written
                break
        unknown = await self._router.jobs.without_record(jobs) if jobs else set()
        begun = [job for job in jobs if job not in unknown]
        if begun:
            await self._router.store.jobs.cancel(begun)

    async def _begin_lines(self, waiting: _Window, part: list[EndedLine]) -> None:
        """Begin each line once the window has room for it, until the batch is cancelled."""
        place, done = 0, self.batch.done
        bounded = self._router.rules.topology.rules_of(self.batch.tenant).max_depth
        most = min(LINES_IN_FLEET, bounded or LINES_IN_FLEET)
        async for _, text in self._lines():
            place += 1
            if place <= done:
                continue
            while len(waiting) >= most or (waiting and waiting[0].done()) or not self._begins(text):
                if self.batch.cancelled:
                    return
                await self._take(waiting, part)
            waiting.append(asyncio.create_task(self._answer(text)))
            waiting[-1].add_done_callback(partial(self._ended, len(text), self._expected))
            if len(waiting) % _LINES_A_TURN == 0:
                await asyncio.sleep(0)

    async def _take(self, waiting: _Window, part: list[EndedLine]) -> None:
        """Write a part if it is time to, then wait for the first line, and take it with all that ended after it.

        Lines that end together are replaced together: the next ones begin in one turn of the event loop, share a
        placement, and are forwarded in one call. A part is written once they have begun, so devices do not wait for it.
        """
        parts = len(self.batch.outputs) + len(self.batch.faults)
        late = asyncio.get_running_loop().time() - self._flushed >= max(_FLUSH, parts / 10)  # so few for hours
        if len(part) >= PART or (part and (late or self._unwritten >= PART_BYTES)):
            await self._flush(part)
        await asyncio.wait((waiting[0],), timeout=_CHECK_EVERY) if waiting else await asyncio.sleep(_CHECK_EVERY)
        while waiting and waiting[0].done():
            part.append(waiting.popleft().result())

    @property
    def _expected(self) -> int:
        """Bytes of the next answers."""
        return self._largest or _ANSWER_BYTES

    def _begins(self, text: bytes) -> bool:
        return self._runner.begins(self.batch.tenant, len(text), self._expected)

    def _ended(self, size: int, expected: int, line: asyncio.Task[EndedLine]) -> None:
        """Count a line of `size` bytes no more, but its answer."""
        answer = 0 if line.cancelled() or line.exception() else len(line.result().written)
        self._unwritten += answer
        self._largest = max(self._largest, answer)
        self._runner.ended(self.batch.tenant, size, expected, answer)

    async def _flush(self, part: list[EndedLine]) -> None:
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
        written = sum(len(one.written) for one in part)
        self._unwritten -= written
        self._runner.lines.add(batch.tenant, -written)
        part.clear()

    async def _answer(self, text: bytes) -> EndedLine:
        """Run one line until it is answered, or too late."""
        line = read_line(text, self.batch.endpoint)
        attempt, failures = 0, count(1)
        while True:
            left = self.batch.expires_at - self._router.store.clock.stored_now()  # equal for all that begin together
            if left <= 0:
                return EndedLine(too_late(line.custom_id), completed=False, expired=True)
            try:
                return await self._ask(line, key_of(self.batch.id, line.custom_id, attempt), left, failures)
            except ResultExpiredError:  # it ended while no router worked on the batch, and nothing is left of it
                attempt += 1
            except DeadlineExceededError:
                return EndedLine(too_late(line.custom_id), completed=False, expired=True)
            except TaxiwayError as error:
                return self._failed(line, error)

    def _failed(self, line: Line, error: TaxiwayError) -> EndedLine:
        """The end of a line that has an error for its answer."""
        body = failure(error, self.batch.endpoint)
        job = str(error.details.get(JOB, ""))
        return EndedLine(answered(line.custom_id, job, error.status, body), completed=False)

    async def _ask(self, line: Line, key: str, left: float, failures: Iterator[int]) -> EndedLine:
        """The answer to a line; retried while the fleet does not accept it, or its answer cannot be read."""
        while True:
            size = len(bytes(line.body))
            try:
                call, request = await beside(size, self._request, line, key, left)
                job, result = await self._run(request, size)
                if isinstance(result, FleetUnavailable):
                    return self._failed(line, result)
                head = AnswerHead(job, tier_of(str(request.service), self._router.rules.topology), self._now())
                body = await beside(size, call.answer, head, result)
                return EndedLine(answered(line.custom_id, job, 200, body), completed=True)
            except FleetUnavailable as error:
                left = self.batch.expires_at - self._router.store.clock.now()
                if left <= 0:
                    raise DeadlineExceededError("the batch's window passed") from error
                await asyncio.sleep(min(_BACKOFF.pause(next(failures)), left))

    async def _run(self, request: Request, size: int) -> tuple[str, Result | FleetUnavailable]:
        """The job of a request, and its result: also the fleet's error that it ended with, as its key has no other."""
        accepted = await self._runner.inference.accept(request, size, awaited=True, notify=False)
        self._jobs.add(accepted.job)
        meta = None
        try:
            meta = await self._runner.inference.ended(accepted)
            if meta is None:
                raise BrokerUnavailableError("the router stops")
            self._jobs.discard(accepted.job)
            return accepted.job, await self._runner.inference.result(meta)
        except TaxiwayError as error:
            error.details.setdefault(JOB, accepted.job)
            if isinstance(error, FleetUnavailable) and meta is not None and not is_answer(meta):
                return accepted.job, error
            raise

    async def _finish(self) -> None:
        """Join the parts to the output and error files, and end the batch."""
        batch = self.batch
        outputs = await self._joined("output", batch.outputs)
        faults = await self._joined("error", batch.faults)
        status = "cancelled" if batch.cancelled else "expired" if batch.expired else "completed"
        status = "failed" if batch.errors else status
        await self._change(
            status=status, output_file_id=outputs, error_file_id=faults, ended_at=self._now(), outputs=[], faults=[]
        )

    async def _joined(self, kind: str, parts: list[str]) -> str:
        """The file that has these parts; empty if there are none."""
        if not parts:
            return ""
        name = f"file-{self.batch.id.removeprefix('batch_')}-{kind}"

        async def pieces() -> AsyncIterator[bytes]:
            for part in parts:
                async for piece in self._contents.read(part):
                    yield piece

        now, after = self._now(), self.batch.output_expires_after
        await self._objects.expect_content(name, now)
        size = await self._contents.write(file_path(name), pieces())
        record = FileRecord(
            id=name,
            tenant=self.batch.tenant,
            bytes=size,
            created_at=now,
            expires_at=None if after is None else now + after.seconds,
            filename=f"{self.batch.id}_{kind}.jsonl",
            purpose="batch_output",
        )
        await self._objects.add_file(record, now, limited=False)
        return name

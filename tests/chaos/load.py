"""Producers: ask for jobs at all doors, wait for their answers, and write down what they were told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from taxiway.contract.job import Result
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, ResultTimeoutError, TaxiwayError, UnknownJobError
from tests.chaos.doors import Asked, Door
from tests.chaos.history import Accepted, Cancelling, Recorder, Refused, Submitted, Unanswered
from tests.chaos.reading import observed
from tests.chaos.wishes import Wish

INSISTING = 20.0
"""Seconds for which a producer asks again, under the same key, after a submit that failed."""

_PAUSE = 0.3  # seconds before it asks again


class Load:
    """Producers on a thread of their own, where `open_doors` is called. `asked` says that all wishes were asked for."""

    def __init__(self, open_doors: Callable[[], Mapping[str, Door]], recorder: Recorder) -> None:
        self._open, self._recorder = open_doors, recorder
        self._doors: Mapping[str, Door] = {}
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.asked = False

    @property
    def settled(self) -> bool:
        """Whether all was asked for, and every waiter was told."""
        return self.asked and not self.waiting

    @property
    def waiting(self) -> int:
        """How many requests are not answered yet."""
        return len(self._tasks)

    def start(self, wishes: Sequence[Wish], seconds: float) -> None:
        """Begin to ask for the wishes, evenly over so many seconds."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._ask_all(wishes, seconds), self._loop)

    def ask(self, wish: Wish) -> None:
        """Ask for one more. Any thread may."""
        self._loop.call_soon_threadsafe(self._begin, wish)

    def stop(self) -> None:
        """Give up on what is not settled yet."""
        asyncio.run_coroutine_threadsafe(self._give_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _ask_all(self, wishes: Sequence[Wish], seconds: float) -> None:
        self._doors = self._open()
        began = time.monotonic()
        for place, wish in enumerate(wishes):
            await asyncio.sleep(max(0.0, began + place * seconds / len(wishes) - time.monotonic()))
            self._begin(wish)
        self.asked = True

    def _begin(self, wish: Wish) -> None:
        task = self._loop.create_task(self._serve(wish))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _give_up(self) -> None:
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for door in self._doors.values():
            await door.close()

    async def _serve(self, wish: Wish) -> None:
        self._recorder.note(Submitted(number=wish.number, model=wish.model, deadline=wish.deadline, key=wish.key))
        if wish.again:
            await asyncio.gather(self._follow(wish, wish.doors), self._follow(wish, wish.doors[::-1]))
        else:
            await self._follow(wish, wish.doors)

    async def _follow(self, wish: Wish, doors: Sequence[str]) -> None:
        """Submit, and wait for the end."""
        accepted = await self._insist(wish, doors)
        if accepted is None:
            return
        job, door = accepted
        if wish.cancel:
            self._recorder.note(Cancelling(job=job.id))
            with suppress(TaxiwayError):
                await job.cancel()
        await self._hear(job, door)

    async def _insist(self, wish: Wish, doors: Sequence[str]) -> tuple[Asked, str] | None:
        """The job, once a door took it, and the door. What has a key is asked for again elsewhere."""
        until = time.monotonic() + (INSISTING if wish.key else 0.0)
        turn = 0
        while True:
            name, began = doors[turn % len(doors)], time.time()
            try:
                job = await self._doors[name].submit(wish)
            except FleetUnavailable as error:
                if time.monotonic() >= until:
                    unclear = isinstance(error, BrokerUnavailableError)
                    self._recorder.note(Refused(number=wish.number, error=error.code, unclear=unclear))
                    return None
                turn += 1
                await asyncio.sleep(_PAUSE)
            except TaxiwayError as error:
                self._recorder.note(Refused(number=wish.number, error=error.code))
                return None
            else:
                replicated = self._doors[name].replicated
                accepted = Accepted(number=wish.number, job=job.id, door=name, began=began, replicated=replicated)
                self._recorder.note(accepted)
                return job, name

    async def _hear(self, job: Asked, door: str) -> None:
        """Record how the job ended; retried while the fleet does not answer or the job is unknown."""
        end: Result | TaxiwayError | None = None
        told = ""
        try:
            while end is None:
                try:
                    end = await job.result(60.0)
                except (BrokerUnavailableError, ResultTimeoutError, UnknownJobError) as error:
                    told = error.message
                    await asyncio.sleep(_PAUSE)
                except TaxiwayError as error:
                    end = error
        except asyncio.CancelledError:
            self._recorder.note(Unanswered(job=job.id, door=door, told=told))
            raise
        self._recorder.note(observed(job.id, door, end))

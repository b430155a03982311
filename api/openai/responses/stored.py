"""The stored responses at one router: one in the background ends with its job, no matter which router looks for it."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from api.inference.infer import Inference
from api.jobs import Jobs
from api.openai.responses.response import (
    MOST_TURNS,
    PREFIX,
    Conversation,
    Response,
    StoredResponse,
    failed,
    no_such_previous,
    succeeded,
    waiting,
)
from api.storage.objects import Objects
from taxiway.contract.job import JobStatus, is_answer
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, JobCancelledError, TaxiwayError, UnknownObjectError

_RESPONSES_A_CALL = 256  # of them looked for by one call
_CHECK_EVERY = 0.5  # seconds between two looks for responses that ended

decode_response = msgspec.json.Decoder(StoredResponse).decode


class Responses:
    """The stored responses. One in the background ends with its job, even if no client polls it.

    Every router looks for those whose jobs have ended.
    """

    def __init__(self, inference: Inference, objects: Objects) -> None:
        self._router = router = inference.router
        self._inference = inference
        self._jobs = Jobs(router)
        self._objects = objects
        self._limits = router.rules.topology.limits

    async def keep(self, stored: StoredResponse) -> None:
        """Store a response; one that has not ended will end with its job."""
        response, now = stored.response, self._router.store.clock.stored_now()
        await self._objects.keep_response(response.id, stored.tenant, stored, now, opened=not response.ended)

    async def conversation(self, previous: str, tenant: str) -> Conversation:
        """A response and those before it.

        Raises:
            InvalidRequestError: one of them is not there, or has not ended; or there are too many.
            RequestTooLargeError: they are too large together.
        """
        try:
            raw = await self._objects.get("response", previous, tenant)
        except UnknownObjectError:
            raise no_such_previous(previous) from None
        names = [*decode_response(raw).earlier, previous]
        found = await self._objects.use_responses(
            names, tenant, self._router.store.clock.stored_now(), most=int(self._limits.payload)
        )
        if len(names) >= MOST_TURNS or None in found:
            raise no_such_previous(names[found.index(None)] if None in found else previous)
        turns = [decode_response(raw) for raw in found]
        turns[-1] = await self._current(turns[-1])
        if not turns[-1].response.ended:
            raise no_such_previous(previous)
        items = [item for turn in turns for item in (*turn.input, *turn.response.output)]
        return Conversation(names, items, turns[-1].locality)

    async def get(self, name: str, tenant: str | None) -> StoredResponse:
        """A response in its current state.

        Raises:
            UnknownObjectError: the tenant has none of that name.
            BrokerUnavailableError: the state store does not answer.
        """
        return await self._current(decode_response(await self._objects.get("response", name, tenant)))

    async def cancel(self, name: str, tenant: str | None) -> StoredResponse:
        """Cancel a response; one that has ended is left unchanged."""
        stored = await self.get(name, tenant)
        if stored.response.ended:
            return stored
        with contextlib.suppress(TaxiwayError):  # its job is gone
            await self._jobs.cancel(stored.response.job)
        stored = await self.get(name, tenant)
        if stored.response.ended:
            return stored
        return await self._end(name, failed(stored.response, JobCancelledError("it was cancelled")))

    async def delete(self, name: str, tenant: str | None) -> None:
        """Delete a response, and cancel it if it has not ended."""
        stored = await self.cancel(name, tenant)
        await self._objects.delete("response", name, stored.tenant)

    async def run(self) -> None:
        """Work until cancelled; another router continues what this one leaves."""
        while True:
            with contextlib.suppress(FleetUnavailable):
                await self._look()
            await asyncio.sleep(_CHECK_EVERY)

    async def _look(self) -> None:
        """End the responses whose jobs have ended."""
        names = await self._objects.open_responses(self._router.store.clock.stored_now() - self._limits.keep_response)
        for start in range(0, len(names), _RESPONSES_A_CALL):
            page = names[start : start + _RESPONSES_A_CALL]
            metas = await self._router.jobs.results([name.removeprefix(PREFIX) for name in page])
            for name, meta in zip(page, metas, strict=True):
                if meta is not None:
                    await self._settle(name, meta)

    async def _settle(self, name: str, meta: bytes) -> None:
        try:
            stored = decode_response(await self._objects.get("response", name, None))
            await self._end(name, await self._answer(stored.response, meta))
        except UnknownObjectError:  # deleted
            await self._objects.close_response(name)

    async def _current(self, stored: StoredResponse) -> StoredResponse:
        response = stored.response
        if response.ended:
            return stored
        try:
            found = await self._jobs.result(response.job, wait=0.0)
        except FleetUnavailable:
            raise
        except TaxiwayError as error:  # its result has expired
            return await self._end(response.id, failed(response, error))
        if isinstance(found, JobStatus):
            return msgspec.structs.replace(stored, response=waiting(response, found.state))
        return await self._end(response.id, await self._answer(response, found))

    async def _answer(self, response: Response, meta: bytes) -> Response:
        """The response with its job's result, or its job's error.

        Raises:
            BrokerUnavailableError: the state store does not answer, so large outputs cannot be read now.
        """
        try:
            return succeeded(response, await self._inference.result(meta), int(self._router.store.clock.now()))
        except TaxiwayError as error:
            if isinstance(error, BrokerUnavailableError) and is_answer(meta):
                raise
            return failed(response, error)

    async def _end(self, name: str, response: Response) -> StoredResponse:
        """Store the final state of a response, unless it has one, and announce it.

        A router that is killed in between leaves it open, so another one announces it, perhaps again.
        """

        def final(raw: bytes) -> StoredResponse:
            stored = decode_response(raw)
            return stored if stored.response.ended else msgspec.structs.replace(stored, response=response)

        stored = decode_response(await self._objects.change("response", name, None, final))
        ended = stored.response
        await self._router.registry.announce("response", ended.status, ended.id, stored.tenant, stored.webhook)
        await self._objects.close_response(name)
        return stored

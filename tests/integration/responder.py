"""A fleet in one thread: takes arrivals, and writes results as routers and workers do. For tests of the client."""

from collections.abc import Callable

import redis

from broker.valkey import run
from broker.valkey.jobs import Ending, finish_call
from tasks.ticket import job_id
from taxiway.contract.job import JobState, Result, accepted_meta, failure_meta, state_of, success_meta
from taxiway.contract.keys import ARRIVALS, INFER, priority_lists, reply_channel, result_key, submission_id
from taxiway.contract.request import Request
from taxiway.contract.values import to_wire
from taxiway.contract.wire import HEADER, Envelope, decode_envelope, read_request
from taxiway.errors import TaxiwayError
from tests.builders import a_report
from tests.waiting import Watcher

REPORT = a_report(variant="none", queue_wait=0.001, run_time=0.002, cost=1e-7, reason="the only device")


def echo(request: Request) -> Result:
    return Result(model="echo:1", outputs={"payload": to_wire(request.inputs)}, report=REPORT)


class Responder(Watcher):
    """Answers each request by `answer`; what that raises is the job's error. Messages taken are kept in `taken`."""

    def __init__(self, url: str, answer: Callable[[Request], Result] = echo) -> None:
        super().__init__()
        self.taken: list[Envelope] = []
        self._url = url
        self._answer = answer

    def watch(self) -> None:
        with redis.Redis.from_url(self._url) as store:
            while not self.over.is_set():
                found = store.brpop(priority_lists(ARRIVALS), timeout=0.1)
                if found is not None:
                    self._handle(store, decode_envelope(found[1]))

    def _handle(self, store: redis.Redis, envelope: Envelope) -> None:
        self.taken.append(envelope)
        if envelope.headers["task"] == INFER:
            job, reply = envelope.headers["id"], envelope.headers[HEADER]["reply"]
            if submission := envelope.headers[HEADER].get("submission"):
                job = job_id(read_request(envelope.payload(), envelope.content_type), b"the responder's secret")
                agreed = accepted_meta(submission_id(submission), job)
                store.set(result_key(submission_id(submission)), agreed)
                store.publish(reply_channel(reply), agreed)
            finish(store, job, lambda: self._answer(read_request(envelope.payload(), envelope.content_type)), reply)


def finish(store: redis.Redis, job: str, answer: Callable[[], Result], reply: str = "") -> None:
    """End a job with what `answer` gives or raises."""
    try:
        ending = Ending(job, JobState.SUCCEEDED, success_meta(job, answer()), reply=reply)
    except TaxiwayError as error:
        ending = Ending(job, state_of(error), failure_meta(job, error), reply=reply)
    run(store, finish_call([ending], keep_result=60, keep_record=120))

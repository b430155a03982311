"""One request gives one answer, and one cause one error text, at the broker, over HTTP and by plain Celery."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import redis
from celery import Celery

import taxiway
from tasks.settings import Settings
from taxiway.contract.keys import ARRIVALS, INFER
from taxiway.contract.request import new_id
from taxiway.errors import RequestError
from tests.producing import producing
from tests.routing import eventually
from tests.serving import served_fleet
from tests.working import worker_settings

Ask = Callable[..., dict[str, Any]]


@dataclass
class Fleet:
    """A router and a worker, and who asks them: one for each interface."""

    state: redis.Redis
    broker: taxiway.Client
    http: taxiway.Client
    celery: Celery

    @property
    def interfaces(self) -> dict[str, Ask]:
        """The outputs of a request, by interface; the error's class name and text are raised as `Refused`."""
        return {
            "broker": lambda model, inputs, **terms: _ask(self.broker, model, inputs, terms),
            "http": lambda model, inputs, **terms: _ask(self.http, model, inputs, terms),
            "celery": lambda model, inputs, **terms: _send(self.celery, model, inputs, terms),
        }


class Refused(Exception):
    """A request's error as an interface reported it."""


def _ask(client: taxiway.Client, model: str, inputs: Any, terms: dict[str, Any]) -> dict[str, Any]:
    try:
        return client.infer(model, inputs, timeout=30, **terms).outputs
    except RequestError as error:
        raise Refused(type(error).__name__, error.message) from error


def _send(celery: Celery, model: str, inputs: Any, terms: dict[str, Any]) -> dict[str, Any]:
    answer = celery.send_task(INFER, kwargs={"model": model, "inputs": inputs, **terms}, queue=ARRIVALS)
    try:
        outputs: dict[str, Any] = answer.get(timeout=30)["outputs"]
    except Exception as error:
        raise Refused(type(error).__name__, str(error)) from error
    return outputs


@pytest.fixture(scope="module")
def fleet(lasting: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with ExitStack() as stack:
        settings = worker_settings(lasting, tmp_path_factory.mktemp("interfaces"))
        served = stack.enter_context(served_fleet(settings))
        broker, http = (stack.enter_context(taxiway.Client(url)) for url in served.interfaces.values())
        celery = stack.enter_context(producing(settings))
        celery.conf.task_routes = None  # who produces with it names the queue
        yield Fleet(stack.enter_context(redis.Redis.from_url(settings.broker)), broker, http, celery)


ROWS = ["one", ["one"], ["one", "two"], b"\xff\x00", [b"\x00", b"\xff"], 5, [1, "two", None]]
NAMED = [{"payload": "one"}, {"payload": ["one"]}, {"flight": "TX 42", "gates": [3, 7]}]


@pytest.mark.parametrize("inputs", [*ROWS, *NAMED], ids=repr)
def test_an_input_gives_one_form_of_output_at_every_interface(fleet: Fleet, inputs: Any) -> None:
    answers = {name: ask("echo", inputs, deadline=30) for name, ask in fleet.interfaces.items()}
    assert answers["http"] == answers["broker"] == answers["celery"]
    assert answers["http"] == (inputs if isinstance(inputs, dict) and "payload" in inputs else {"payload": inputs})


@pytest.mark.parametrize("samples", [1000, [1000], [1000, 2000]])
def test_numbers_have_one_form_too(fleet: Fleet, samples: Any) -> None:
    inputs = {"samples": samples, "seed": 7 if isinstance(samples, int) else [7] * len(samples)}
    broker, http = (
        client.infer("slab", inputs, timeout=30, deadline=30).outputs for client in (fleet.broker, fleet.http)
    )
    assert broker == http
    assert np.ndim(broker["estimate"]) == np.ndim(samples)


@pytest.mark.parametrize("inputs", ["one", ["one"]])
def test_a_job_has_one_answer_by_its_id_at_whichever_interface_it_is_asked_for(fleet: Fleet, inputs: Any) -> None:
    for client in (fleet.broker, fleet.http):
        job = client.submit("echo", inputs, deadline=30)
        job.result(timeout=30)
        by_id = [other.job(job.id).result(timeout=30) for other in (fleet.broker, fleet.http)]
        assert by_id[0] == by_id[1]
        assert by_id[0].outputs == {"payload": inputs}


def _nested(levels: int) -> Any:
    return [_nested(levels - 1)] if levels else "a"


DEEP = _nested(80)


@pytest.mark.cases("model, inputs, terms")
def test_a_cause_has_one_text_at_every_interface(fleet: Fleet, model: str, inputs: Any, terms: dict[str, Any]) -> None:
    errors = {}
    for name, ask in fleet.interfaces.items():
        with pytest.raises(Refused) as caught:
            ask(model, inputs, **{"deadline": 30, **terms})
        errors[name] = caught.value.args
    assert errors["http"] == errors["broker"] == errors["celery"]


PARAMETERS = [
    (float("nan"), "parameters: expected finite numbers"),
    ({1, 2}, "parameters: expected JSON values"),
    (np.float32(0.5), r"parameters.loud: expected a parameter of echo:1 \(it has none\), got 0.5"),
]


@pytest.mark.parametrize("value, text", PARAMETERS, ids=repr)
def test_a_parameter_of_any_type_is_sent_or_refused_alike_by_either_client(fleet: Fleet, value: Any, text: str) -> None:
    for client in (fleet.broker, fleet.http):
        with pytest.raises(RequestError, match=text):
            client.infer("echo", "a", parameters={"loud": value}, timeout=30, deadline=30)


class Label(str):
    """A text of a subclass, as other libraries have them."""


def test_terms_may_be_of_numpys_types_and_of_subclasses(fleet: Fleet) -> None:
    terms: Any = {
        "deadline": np.float64(30),
        "budget": np.float32(1),
        "tenant": np.str_("lab"),
        "outputs": [Label("payload")],
    }
    for client in (fleet.broker, fleet.http):
        outputs = client.infer(Label("echo"), "a", timeout=30, **terms, idempotency_key=Label(new_id())).outputs
        assert outputs == {"payload": "a"}


def test_a_request_that_is_too_large_is_refused_with_both_figures_at_every_interface(fleet: Fleet) -> None:
    large = "x" * (17 * 2**20)
    for ask in fleet.interfaces.values():
        with pytest.raises(Refused) as caught:
            ask("echo", large, deadline=30)
        kind, text = caught.value.args
        assert kind == "RequestTooLargeError"
        assert text.startswith(f"payload: expected at most {16 * 2**20} bytes, got 1782")


def test_the_broker_lists_the_same_models_as_http(fleet: Fleet) -> None:
    assert fleet.broker.models() == fleet.http.models()


def test_plain_celery_without_a_queue_is_refused_with_the_right_queue_and_other_messages_stay(fleet: Fleet) -> None:
    others = fleet.celery.send_task("their.task", args=[INFER])
    answer = fleet.celery.send_task(INFER, kwargs={"model": "echo", "inputs": "hello"})
    began = time.monotonic()
    with pytest.raises(Exception, match=r"queue: expected 'taxiway.arrivals', got 'celery': send the task"):
        answer.get(timeout=20)
    assert time.monotonic() - began < 10
    left = eventually(lambda: len(raw := fleet.state.lrange("celery", 0, -1)) == 1 and raw)
    assert others.id.encode() in left[0]

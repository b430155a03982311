"""A delivery becomes a job: its request is read, bound to its model and cut into rows."""

from __future__ import annotations

from tasks.catalogue import Catalogue
from tasks.signature import bind
from taxiway.errors import ExecutionError, InvalidRequestError, TaxiwayError
from taxiway.wire import read_request
from workers.batcher import bucket_of
from workers.executor import Loaded
from workers.pipelines import Item
from workers.strategy import bytes_of
from workers.work import Delivery, Job


class Intake:
    """Reads deliveries for one hardware class."""

    def __init__(self, catalogue: Catalogue, hardware_class: str) -> None:
        self._catalogue = catalogue
        self._hardware_class = hardware_class

    def admit(self, delivery: Delivery, now: float) -> Job:
        """The job, whose rows are bound and not prepared yet.

        Raises:
            RequestError: the request is wrong, or its model is not in this worker's catalogue.
        """
        message, ticket = delivery.request.message, delivery.ticket
        request = read_request(bytes_of(message.body), message.content_type)
        model = self._catalogue.resolve(ticket.model)
        variant = ticket.variants[self._hardware_class]
        if variant not in model.variants:
            raise InvalidRequestError(
                f"model: expected a variant of {model.id} ({', '.join(model.variants)}), got {variant!r}", field="model"
            )
        bound = bind(model, request.inputs, request.parameters, request.outputs)
        return Job(
            delivery=delivery,
            ticket=ticket,
            model=model,
            variant=variant,
            rows=bound.rows,
            parameters=bound.parameters,
            outputs=bound.outputs,
            single=bound.single,
            arrived=now,
        )


def prepare(job: Job, loaded: Loaded) -> None:
    """Turn the job's rows into items.

    Raises:
        RequestError: a row is wrong; names the input, and the row where there are several.
        ExecutionError: the pipeline itself failed.
    """
    items: list[Item] = []
    for index, row in enumerate(job.rows):
        try:
            items.append(loaded.pipeline.prepare(row, job.parameters))
        except TaxiwayError as error:
            raise named_row(error, index, job) from error
        except Exception as error:  # a pipeline's own code may raise anything
            failed = ExecutionError(f"{loaded.key}: cannot prepare it: {type(error).__name__}: {error}")
            raise named_row(failed, index, job) from error
    job.items = items


def gather(job: Job) -> None:
    """Let all the prepared rows wait, as if none had run, each in the bucket of its size."""
    job.answers = [None] * len(job.items)
    job.waiting = {}
    for index, item in enumerate(job.items):
        job.waiting.setdefault(bucket_of(item.size, job.model.buckets), []).append(index)


def named_row(error: TaxiwayError, index: int, job: Job) -> TaxiwayError:
    """The error with the row's index, where the job has more than one."""
    if len(job.rows) == 1:
        return error
    return type(error)(f"row {index}: {error.message}", **(error.details | {"row": index}))

"""The wheel: the Python client, its errors and the wire contract.

Names are imported on first access, which keeps `import taxiway` fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taxiway.client.arrays import ArrayProgress, AsyncJobArray
    from taxiway.client.asyncio_client import AsyncClient, AsyncJob
    from taxiway.client.sync_client import Client, Job, JobArray
    from taxiway.contract.job import JobRecord, JobState, JobStatus, Result, RunReport
    from taxiway.contract.progress import RunProgress
    from taxiway.contract.stream import Lost, Restarted
    from taxiway.errors import (
        BrokerFullError,
        BrokerUnavailableError,
        DeadLetteredError,
        DeadlineExceededError,
        DeviceFaultError,
        ExecutionError,
        FleetUnavailable,
        ForbiddenError,
        IdempotencyConflictError,
        InvalidRequestError,
        JobCancelledError,
        JobError,
        ModelUnavailableError,
        NoDeviceError,
        OverloadedError,
        RateLimitedError,
        RequestError,
        RequestTooLargeError,
        ResultExpiredError,
        ResultTimeoutError,
        TaxiwayError,
        UnauthenticatedError,
        UnknownJobError,
        UnknownLetterError,
        UnknownModelError,
        UnknownObjectError,
        UnplaceableError,
        UnsupportedEncodingError,
    )
    from taxiway.run import Run

__all__ = [
    "ArrayProgress",
    "AsyncClient",
    "AsyncJob",
    "AsyncJobArray",
    "BrokerFullError",
    "BrokerUnavailableError",
    "Client",
    "DeadLetteredError",
    "DeadlineExceededError",
    "DeviceFaultError",
    "ExecutionError",
    "FleetUnavailable",
    "ForbiddenError",
    "IdempotencyConflictError",
    "InvalidRequestError",
    "Job",
    "JobArray",
    "JobCancelledError",
    "JobError",
    "JobRecord",
    "JobState",
    "JobStatus",
    "Lost",
    "ModelUnavailableError",
    "NoDeviceError",
    "OverloadedError",
    "RateLimitedError",
    "RequestError",
    "RequestTooLargeError",
    "Restarted",
    "Result",
    "ResultExpiredError",
    "ResultTimeoutError",
    "Run",
    "RunProgress",
    "RunReport",
    "TaxiwayError",
    "UnauthenticatedError",
    "UnknownJobError",
    "UnknownLetterError",
    "UnknownModelError",
    "UnknownObjectError",
    "UnplaceableError",
    "UnsupportedEncodingError",
]

_HOMES = {
    "ArrayProgress": "taxiway.client.arrays",
    "AsyncJobArray": "taxiway.client.arrays",
    "AsyncClient": "taxiway.client.asyncio_client",
    "AsyncJob": "taxiway.client.asyncio_client",
    "Client": "taxiway.client.sync_client",
    "Job": "taxiway.client.sync_client",
    "JobArray": "taxiway.client.sync_client",
    "Lost": "taxiway.contract.stream",
    "Restarted": "taxiway.contract.stream",
    "Run": "taxiway.run",
    "RunProgress": "taxiway.contract.progress",
}
_JOBS = ("JobRecord", "JobState", "JobStatus", "Result", "RunReport")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'taxiway' has no attribute {name!r}")
    home = _HOMES.get(name) or ("taxiway.contract.job" if name in _JOBS else "taxiway.errors")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)

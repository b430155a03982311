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
    from taxiway.contract.job import JobRecord, JobState, JobStatus, Result, RunProgress, RunReport
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
        SealedError,
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
    "SealedError",
    "TaxiwayError",
    "UnauthenticatedError",
    "UnknownJobError",
    "UnknownLetterError",
    "UnknownModelError",
    "UnknownObjectError",
    "UnplaceableError",
    "UnsupportedEncodingError",
]

_HOMES = (
    *("errors", "run", "contract.job", "contract.stream"),
    *("client.arrays", "client.asyncio_client", "client.sync_client"),
)
"""The modules with these names, in the order in which a name is looked for: the first ones import least."""


def __getattr__(name: str) -> Any:
    for home in _HOMES if name in __all__ else ():
        module = importlib.import_module(f"taxiway.{home}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'taxiway' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

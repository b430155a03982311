"""What all endpoints share: the router, what it stores, and who may see which of its jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from litestar import Response

from api.gate import AnyRequest, caller_of
from api.jobs import Jobs
from api.routing.router import HttpRouter

if TYPE_CHECKING:
    from api.objects.stored import StoredObjects

JsonResponse = Response[dict[str, Any]]

SERVICES = "services"
"""Where the application keeps what `services_of` gives."""


def services_of(request: AnyRequest) -> StoredObjects:
    """What the endpoints need besides the request."""
    services: StoredObjects = request.app.state[SERVICES]
    return services


def tenant_of(request: AnyRequest) -> str | None:
    """The caller's tenant; None if it may see all."""
    return caller_of(request.scope).tenant


def router_of(request: AnyRequest) -> HttpRouter:
    """The router in this process."""
    return services_of(request).router


def jobs_of(request: AnyRequest) -> Jobs:
    """The jobs that the caller may see."""
    return Jobs(router_of(request), tenant_of(request))

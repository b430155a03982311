"""The HTTP API as an ASGI application: its endpoints, and what every request passes before them."""

from __future__ import annotations

from litestar import Litestar
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler

from api.access import TenantRates
from api.bodies import BodyLimits, Inflated
from api.described import document
from api.errors import protocol_error, taxiway_error, unforeseen_error
from api.gate import Gate, Named, guard
from api.inference import model_endpoints as models
from api.inference.infer import Front
from api.keys_file import KeyFile
from api.objects import endpoints as stored
from api.objects import webhook_endpoints as webhooks
from api.objects.stored import StoredObjects
from api.openai import endpoints as openai
from api.openai.responses import endpoints as responses
from api.operators import fleet
from api.operators import job_endpoints as jobs
from api.pages import endpoints as pages
from api.peers.connection import PeerDesk
from api.peers.socket import WithPeers
from api.routing.router import HttpRouter
from api.services import SERVICES
from taxiway.contract.peers import WaitingLine
from taxiway.errors import TaxiwayError
from taxiway.release import release

_SUBJECTS = (fleet, models, jobs, pages, openai, stored, responses, webhooks)

ENDPOINTS = [one for subject in _SUBJECTS for one in vars(subject).values() if isinstance(one, HTTPRouteHandler)]
"""All that are defined there."""


def make_app(router: HttpRouter, keys: KeyFile | None, store: StoredObjects, reached: WaitingLine) -> WithPeers:
    """The HTTP API of `router` for callers with one of `keys`; without keys, for every caller. `store` has files.

    `reached` as in `WaitingLines`.
    """
    limits = router.rules.topology.limits
    limit = int(limits.payload)
    app = Litestar(
        route_handlers=ENDPOINTS,
        guards=[guard],
        middleware=[Named],
        exception_handlers={TaxiwayError: taxiway_error, HTTPException: protocol_error, Exception: unforeseen_error},
        openapi_config=document(release()),
        request_max_body_size=limit,
        logging_config=None,
    )
    inference = store.inference
    app.state[SERVICES] = store
    bodies, front = store.bodies, Front(app, inference, limit)
    inflated = Inflated(front, BodyLimits(front, bodies, limit), limit, limits.inflation)
    rates = TenantRates(router.rules.topology)
    http = Gate(BodyLimits(inflated, bodies, limit), keys, rates)
    return WithPeers(http, PeerDesk(router, inference, rates, bodies), keys, reached)

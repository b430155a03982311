"""A Django application for ASGI."""

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path

from tests.integration.client.webapps import async_clients, clients

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="of a test")
CLIENTS, ASYNC_CLIENTS = clients(), async_clients()


def by_client(request: HttpRequest, interface: str) -> JsonResponse:
    result = CLIENTS[interface].infer("echo", request.GET["text"], timeout=30)
    return JsonResponse(result.outputs["payload"], safe=False)


async def by_async_client(request: HttpRequest, interface: str) -> JsonResponse:
    result = await ASYNC_CLIENTS[interface].infer("echo", request.GET["text"], timeout=30)
    return JsonResponse(result.outputs["payload"], safe=False)


urlpatterns = [path("<str:interface>/def", by_client), path("<str:interface>/async", by_async_client)]
app = get_asgi_application()

"""A FastAPI application."""

from fastapi import FastAPI

from tests.integration.client.webapps import async_clients, clients

app = FastAPI()
CLIENTS, ASYNC_CLIENTS = clients(), async_clients()


@app.get("/{interface}/async")
async def by_async_client(interface: str, text: str) -> str:
    return str((await ASYNC_CLIENTS[interface].infer("echo", text, timeout=30)).outputs["payload"])


@app.get("/{interface}/def")
def by_client(interface: str, text: str) -> str:
    return str(CLIENTS[interface].infer("echo", text, timeout=30).outputs["payload"])


@app.get("/{interface}/blocking")
async def by_client_on_the_loop(interface: str, text: str) -> str:
    return str(CLIENTS[interface].infer("echo", text, timeout=30).outputs["payload"])

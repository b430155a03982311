"""A FastAPI application."""

from __future__ import annotations

from fastapi import FastAPI

from tests.integration.client.webapps import async_clients, clients

app = FastAPI()
CLIENTS, ASYNC_CLIENTS = clients(), async_clients()


@app.get("/{door}/async")
async def by_async_client(door: str, text: str) -> str:
    return str((await ASYNC_CLIENTS[door].infer("echo", text, timeout=30)).outputs["payload"])


@app.get("/{door}/def")
def by_client(door: str, text: str) -> str:
    return str(CLIENTS[door].infer("echo", text, timeout=30).outputs["payload"])


@app.get("/{door}/blocking")
async def by_client_on_the_loop(door: str, text: str) -> str:
    return str(CLIENTS[door].infer("echo", text, timeout=30).outputs["payload"])

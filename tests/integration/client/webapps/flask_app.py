"""A Flask application; with `BEFORE_FORK` in the environment its clients submit a job where the module is imported."""

from __future__ import annotations

import os

from flask import Flask, jsonify, request
from flask.typing import ResponseReturnValue

from tests.integration.client.webapps import clients

app = Flask(__name__)
CLIENTS = clients()
EARLY = {door: client.submit("echo", "early") for door, client in CLIENTS.items() if "BEFORE_FORK" in os.environ}


@app.get("/<door>/def")
def by_client(door: str) -> ResponseReturnValue:
    return jsonify(CLIENTS[door].infer("echo", request.args["text"], timeout=30).outputs["payload"])


@app.get("/<door>/early")
def by_job_of_the_parent(door: str) -> ResponseReturnValue:
    return jsonify(EARLY[door].result(timeout=30).outputs["payload"])

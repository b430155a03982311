"""A Flask application; with `BEFORE_FORK` in the environment its clients submit a job where the module is imported."""

import os

from flask import Flask, jsonify, request
from flask.typing import ResponseReturnValue

from tests.integration.client.webapps import clients

app = Flask(__name__)
CLIENTS = clients()
EARLY = {
    interface: client.submit("echo", "early") for interface, client in CLIENTS.items() if "BEFORE_FORK" in os.environ
}


@app.get("/<interface>/def")
def by_client(interface: str) -> ResponseReturnValue:
    return jsonify(CLIENTS[interface].infer("echo", request.args["text"], timeout=30).outputs["payload"])


@app.get("/<interface>/early")
def by_job_of_the_parent(interface: str) -> ResponseReturnValue:
    return jsonify(EARLY[interface].result(timeout=30).outputs["payload"])

"""A Flask application."""

from flask import Flask, jsonify, request
from flask.typing import ResponseReturnValue

from tests.integration.client.webapps import clients

app = Flask(__name__)
CLIENTS = clients()


@app.get("/<interface>/def")
def by_client(interface: str) -> ResponseReturnValue:
    return jsonify(CLIENTS[interface].infer("echo", request.args["text"], timeout=30).outputs["payload"])

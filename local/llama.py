"""`python -m local.llama FILE`: llama.cpp's server of one GGUF file, from the wheel xllamacpp (the group `llama`).

`start: {llama: FILE}` of an endpoint in queues.yaml starts it. Its address is printed once it serves.
"""

from __future__ import annotations

import argparse
import signal
import sys

from xllamacpp import CommonParams, Server

CONTEXT = 4096
"""Tokens of prompt and answer in a slot: 8 slots of a model of a billion parameters take less than a gigabyte."""

SIMILAR = 0.5
"""The share of a prompt that a slot must have in its cache to be chosen for that. With the server's 0.1 any chat's
template is enough, and a generation that was cut is not looked for among former slots: it read 65 of 89 tokens again
instead of one."""


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(prog="python -m local.llama", description="Serves a GGUF file by llama.cpp.")
    parser.add_argument("file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 for a free one")
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of a slot")
    parser.add_argument("--threads", type=int, default=-1, help="-1 for one per core")
    parser.add_argument("--name", action="append", required=True, help="what the model is called")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parameters = CommonParams()
    parameters.model.path = given.file
    parameters.model_alias = set(given.name)
    parameters.n_parallel, parameters.n_ctx = given.slots, given.context * given.slots
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = given.threads
    parameters.hostnames, parameters.port = [given.host], given.port
    parameters.endpoint_metrics = True
    parameters.slot_prompt_similarity = SIMILAR
    server = Server(parameters)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main()

"""Runs a variant's graph on a device: one file per runtime, and only that file imports it (`workers.port`).

Nothing here loads pickled code: graphs are ONNX, weights are safetensors for a registered architecture.
"""

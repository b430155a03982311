"""What a model is to the fleet: its model.yaml, files, signature, sizes and profiles.

`catalogue` parses model.yaml and `folder` follows the models folder. `artefacts` and `sources` bring files into the
cache; `files` finds recipes, networks and callables. `signature`, `sizes` and `units` bind and measure a request.
Forbidden here: importing a runtime.
"""

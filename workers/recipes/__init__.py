"""Converts weights into artefacts, once, each in a separate process (`python -m workers.recipes`).

Here are the recipes that several models share; one of a single model lies beside its model.yaml, and
`tasks.models.files` finds both. Each is a module with one function `make(inputs, output, options)`: `inputs` are
verified files by the names that model.yaml gives them, `output` is the file to write, `options` are model.yaml's.
A recipe may import modules of this package and nothing else of taxiway: their text is part of the key under which the
artefact is kept. Forbidden here: fetching, and reading pickled code other than with `weights_only=True`.
"""

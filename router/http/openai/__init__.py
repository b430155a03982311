"""OpenAI's API at the HTTP door: its calls are converted to requests of ours, and results to its answers.

`asked` reads what a caller asks, `terms` its service terms, and `answers` and `errors` write what it gets; these do no
I/O. `calls` runs requests, on the same path as the infer protocol's, `chunks` streams them, and `endpoints` has the
calls with their paths. `objects` keeps files and batches, `batches` is a batch as a value, `batch_runner` works on it.

Source: https://platform.openai.com/docs/api-reference.
"""

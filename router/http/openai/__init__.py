"""OpenAI's API at the HTTP door: its calls are converted to requests of ours, and results to its answers.

`requests` reads calls and their service terms, `answers` and `errors` write answers; these do no I/O. `calls`
runs requests, on the same path as the infer protocol's, and `endpoints` has the calls with their paths. `objects` keeps
files, batches and responses, `stored` is all that a router keeps; `batches` and `responses` are these as values,
`response_events` streams them, `batch_runner` works on batches, and the modules `…_endpoints` have their paths.

Source: https://platform.openai.com/docs/api-reference.
"""

"""OpenAI's API at the HTTP door: its calls are converted to requests of ours, and results to its answers.

`requests` reads calls and their service terms; `answers`, `headers`, `chunks` and `errors` write answers; these do no
I/O. `calls` runs requests, on the same path as the infer protocol's, and `endpoints` has the calls with their paths.
`responses` is the Responses API. `objects` keeps files, batches and responses, and `stored` is all that a router keeps;
`batches` are batches as values, `batch_runner` works on them, and the modules `…_endpoints` have their paths.

Source: https://platform.openai.com/docs/api-reference.
"""

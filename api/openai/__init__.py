"""OpenAI's calls: converted to requests of ours, and results to its answers.

`requests` reads calls and their service terms, and `answers` writes answers; these do no I/O. `calls` runs requests, on
the same path as the infer protocol's, and `endpoints` has the calls with their paths. `responses` is the Responses API.

Source: https://platform.openai.com/docs/api-reference.
"""

"""The HTTP API: everything that answers HTTP, in front of a router in the same process (`python -m api`).

`inference` is the Open Inference Protocol v2, `openai` OpenAI's chat, completions, embeddings and responses, `objects`
its files, batches and webhook endpoints, and `operators` the fleet for those who run it. `app` puts them together;
`gate` identifies callers by `access` and `keys_file`, `bodies` bounds and inflates what they send, `terms` reads what
they ask for, `jobs` is what they may see, `storage` what they store, `routing` is the router as they have it, and
`server` serves all in the event loop.
"""

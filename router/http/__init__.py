"""The HTTP door: the Open Inference Protocol v2, and the jobs behind it.

`protocol` converts values to that protocol's. `app` has the endpoints; `inference` also serves the busiest one
directly. `streaming` sends answers as they are generated, and `progress` says which parts of them are new. `gate`
identifies callers, `bodies` bounds and inflates what they send. `openai` has OpenAI's API. `server` serves all in the
router's event loop, one `connection` per client.
"""

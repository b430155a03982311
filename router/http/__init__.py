"""The HTTP door: the Open Inference Protocol v2, and the jobs behind it.

`protocol` and `metadata` turn values into the protocol's; `app` has the endpoints; `server` serves them in the router's
event loop.
"""

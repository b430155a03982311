"""The HTTP door: the Open Inference Protocol v2, and the jobs behind it.

`protocol` and `metadata` turn values into the protocol's; `app` has the endpoints, and `front` the one that is asked
most; `streaming` tells answers as they are generated; `server` serves them all in the router's event loop.
"""

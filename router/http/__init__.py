"""The HTTP door: the Open Inference Protocol v2, and the jobs behind it.

`protocol` and `metadata` convert values to the protocol's. `app` has the endpoints, and `serving/front` the busiest
one. `streaming` sends answers as they are generated. `serving/server` serves them all in the router's event loop.
"""

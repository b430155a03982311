"""Where each request goes.

`classify`, `cost` and `placement` only decide; `snapshot` reads the fleet, `service` consumes arrivals and publishes,
`http/` is the HTTP door. Forbidden here: importing `workers`.
"""

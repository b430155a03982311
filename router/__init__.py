"""Where each request goes.

`decide/` only decides; `service/` consumes arrivals, reads the fleet and forwards jobs; `upkeep/` is periodic work for
the fleet. `router` composes them, and `process` runs them. Forbidden here: importing `workers`, or anything of HTTP.
"""

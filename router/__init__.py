"""Where each request goes.

`decide/` only decides; `service/` consumes arrivals, reads the fleet and forwards jobs; `http/` is the HTTP door;
`upkeep/` does periodic work for the fleet. Forbidden here: importing `workers`.
"""

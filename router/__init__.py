"""Where each request goes.

`decide/` only decides; `service/` consumes arrivals, reads the fleet and forwards jobs; `http/` is the HTTP door;
`upkeep` is periodic work for the fleet, and `waiting` what the leader does with waiting work. Forbidden here: importing
`workers`.
"""

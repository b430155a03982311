#!/bin/sh
# Whether the worker in this container is alive: 0 while it touched its file in the last 5 seconds (tasks.heartbeat.GONE_AFTER),
# or in as many as are given.
# It touches it with each heartbeat that the state store took. A look costs 3 ms of processor time.
[ -n "$(find "$TAXIWAY_ALIVE" -newermt "${1:-5} seconds ago" 2>/dev/null)" ]

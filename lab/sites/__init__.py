"""Three sites with different hours in one event loop: what offers between fleets are worth (`python -m lab.sites`).

`hours` draws what arrives, `fleets/` has each site's queues.yaml, `site` is one of them, and `region` are all of them
with the lines between them. Decisions and offers are the product's own functions.
"""

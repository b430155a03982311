"""Other fleets that hand work to this one, over a WebSocket each (`taxiway.contract.peers`).

A peer is a tenant: what it sends is checked, placed and answered as the tenant's HTTP requests are. Forbidden here:
another way to place.
"""

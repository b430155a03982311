"""The endpoints of the HTTP door: each reads its request, calls the router and writes the answer."""

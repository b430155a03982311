"""How HTTP connections are served: parsing, limits on connections and bodies, and the server."""

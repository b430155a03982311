"""The Python client. Doors do the I/O, one a kind of address; the clients give them a face.

`asyncio_client` holds the one implementation; `sync_client` runs it on a thread of its own.
"""

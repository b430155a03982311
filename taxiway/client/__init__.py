"""The Python client. A door does the I/O for one kind of address; the client classes are the public API over it.

`asyncio_client` holds the one implementation; `sync_client` runs it on a background thread.
"""

"""HTTP for azure-core: the process's connections, bodies in the caller's memory, retries, throttling.

`GatherTransport` is what the clients of the Azure SDK are given. Nothing here knows about blobs.
"""

"""How do bytes reach the socket, and when is a failed request tried again?

The clients of the Azure SDK get a `GatherTransport` and a `RetryPolicy`; requests carry the classes of `buffers`.
Nothing here knows about blobs.
"""

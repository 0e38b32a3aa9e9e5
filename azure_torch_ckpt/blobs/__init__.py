"""The verbs on blobs: put, read, list, copy and delete, in blocks and ranges. The only door to azure-storage-blob.

`BlobStore` has the verbs for one container; `Upload` and `Download` move memory views with many requests at a time.
"""

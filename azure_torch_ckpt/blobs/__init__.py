"""What can be done with blobs: put, read, list, copy and delete, in blocks and ranges.

Only this folder calls azure-storage-blob. `BlobStore` has the verbs for one container; `Upload` and `Download` move
memory views with many requests at a time; `outcome` commits with a condition. Other folders may use every module here
except `direct_requests`, `signing` and `error_translation`, which serve `BlobStore`.
"""

"""What fsspec sees behind ``azblob://``: `AzureBlobFileSystem`, for every library that takes fsspec's URLs.

Other folders import nothing but this class. `spec` has its methods that open, read, write, copy and remove;
`listing_filesystem` has the constructor and the methods that only ask. The other modules each do one part of that work.
"""

from __future__ import annotations

from azure_torch_ckpt.filesystem.spec import AzureBlobFileSystem

__all__ = ["AzureBlobFileSystem"]

"""`AzureBlobFileSystem` on the emulator, registered with fsspec, and ``azblob://`` URLs from those of the fixtures."""

from __future__ import annotations

from typing import Any

import fsspec

from azure_torch_ckpt import BlobLocation
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.filesystem import AzureBlobFileSystem

# The entry point does this for an installed package; a source tree has none.
fsspec.register_implementation("azblob", AzureBlobFileSystem, clobber=True)

VARIABLES = ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_ACCOUNT")


def azblob(url: str) -> str:
    """Return the ``azblob://`` URL for the ``http://`` URL of a fixture."""
    location = BlobLocation.parse(url)
    return "/".join(filter(None, (f"azblob://{location.account}/{location.container}", location.path)))


def connection_string(url: str) -> str:
    location = BlobLocation.parse(url)
    return f"AccountName={location.account};AccountKey={Azurite.account_key};BlobEndpoint={location.endpoint}"


def filesystem(url: str, **options: Any) -> AzureBlobFileSystem:
    """Make a filesystem for the endpoint of a fixture's URL; without a credential, with the emulator's key."""
    if not options.keys() & {"credential", "account_key", "sas_token", "connection_string", "anon"}:
        options["account_key"] = Azurite.account_key
    return AzureBlobFileSystem(endpoint=BlobLocation.parse(url).endpoint, **options)

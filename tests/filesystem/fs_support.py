"""The filesystem behind ``azblob://``, made known to fsspec, and URLs for it from those of the fixtures."""

from __future__ import annotations

import os
from typing import Any

import fsspec
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import BlobLocation
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.filesystem import AzureBlobFileSystem
from tests.support.sharded import assert_same, empty, expected, failures, plain, rows

# The entry point does this for an installed package; a source tree has none.
fsspec.register_implementation("azblob", AzureBlobFileSystem, clobber=True)

VARIABLES = ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_ACCOUNT")


def azblob(url: str) -> str:
    """The ``azblob://`` URL of a fixture's ``http://`` one."""
    location = BlobLocation.parse(url)
    return "/".join(filter(None, (f"azblob://{location.account}/{location.container}", location.path)))


def connection_string(url: str) -> str:
    location = BlobLocation.parse(url)
    return f"AccountName={location.account};AccountKey={Azurite.account_key};BlobEndpoint={location.endpoint}"


def filesystem(url: str, **options: Any) -> AzureBlobFileSystem:
    """For the endpoint of a fixture's URL, with the emulator's key unless there is another credential."""
    if not options.keys() & {"credential", "account_key", "sas_token", "connection_string", "anon"}:
        options["account_key"] = Azurite.account_key
    return AzureBlobFileSystem(endpoint=BlobLocation.parse(url).endpoint, **options)


# What ranks run


def save_by_url(url: str, version: int, sharded: bool, **save: Any) -> None:
    """What a program does that knows nothing of this package."""
    os.environ["AZURE_STORAGE_CONNECTION_STRING"] = connection_string(url)
    dcp.save((rows if sharded else plain)(version), checkpoint_id=azblob(url), **save)


def load_by_url(url: str, version: int, sharded: bool) -> None:
    os.environ["AZURE_STORAGE_CONNECTION_STRING"] = connection_string(url)
    state = empty((rows if sharded else plain)(version))
    dcp.load(state, checkpoint_id=azblob(url))
    assert state.pop("step") == version
    for name, value in state.items():
        assert_same(value, expected(name, version), name)


def save_that_fails(url: str) -> list[str]:
    """Names of the errors that a save without permission to write has, by rank."""
    os.environ["AZURE_STORAGE_CONNECTION_STRING"] = connection_string(url)
    return [type(error).__name__ for error in failures(lambda: dcp.save(rows(1), checkpoint_id=azblob(url))).values()]

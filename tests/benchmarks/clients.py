"""The ways to save and load that are compared, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import LoadPlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter  # it has no public name

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter, TransferOptions
from tests.benchmarks.null_storage import NullStorage
from tests.benchmarks.raw_clients import ObstoreClient, SdkClient
from tests.benchmarks.spec import Address, Case
from tests.benchmarks.works import State


class Client(Protocol):
    """Saves a state dict at a path of a container, and loads what such a client saved there."""

    def save(self, state: State, path: str) -> None: ...

    def load(self, state: State, path: str, planner: LoadPlanner | None) -> None: ...


class DcpClient:
    """torch.distributed.checkpoint with a writer and a reader.

    Args:
        writer: makes the writer for a path.
        reader: makes the reader for a path.
    """

    def __init__(self, writer: Callable[[str], StorageWriter], reader: Callable[[str], StorageReader]) -> None:
        self._writer = writer
        self._reader = reader

    def save(self, state: State, path: str) -> None:
        dcp.save(state, storage_writer=self._writer(path))

    def load(self, state: State, path: str, planner: LoadPlanner | None) -> None:
        dcp.load(state, storage_reader=self._reader(path), planner=planner)


def make(case: Case, address: Address) -> Client:
    """The client that a case names."""
    return _CLIENTS[case.client](case, address)


def _ours(case: Case, address: Address) -> Client:
    options: dict[str, Any] = {
        "credential": address.key,
        "options": TransferOptions(concurrency=case.connections, checksums=case.checksums),
        "ca_file": address.ca_file,
    }
    return DcpClient(
        lambda path: AzureBlobWriter(f"{address.container_url}/{path}", **options),
        lambda path: AzureBlobReader(f"{address.container_url}/{path}", **options),
    )


def _adlfs(case: Case, address: Address) -> Client:
    """As its users have it: adlfs' own default of connections, one thread of FsspecWriter's."""
    if address.key is None:
        account = address.account.partition("://")[2].partition(".")[0]
        options: dict[str, Any] = {"account_name": account, "anon": False}
    else:
        scheme, account = address.account.partition("://")[0], address.account.rpartition("/")[2]
        options = {
            "connection_string": f"DefaultEndpointsProtocol={scheme};AccountName={account};AccountKey={address.key};"
            f"BlobEndpoint={address.account};"
        }
    return DcpClient(
        lambda path: FsspecWriter(f"abfs://{address.container}/{path}", **options),
        lambda path: FsspecReader(f"abfs://{address.container}/{path}", **options),
    )


def _blobio(case: Case, address: Address) -> Client:
    from tests.benchmarks.dcp_over_blobio import (
        BlobIOReader,
        BlobIOWriter,
        use_connections,
    )  # azstoragetorch is elsewhere

    use_connections(case.connections)
    return DcpClient(lambda path: BlobIOWriter(path, address), lambda path: BlobIOReader(path, address))


def _null(case: Case, address: Address) -> Client:
    storage = NullStorage()
    return DcpClient(storage.writer, storage.reader)


_CLIENTS: dict[str, Callable[[Case, Address], Client]] = {
    "ours": _ours,
    "adlfs": _adlfs,
    "azstoragetorch": _blobio,
    "null": _null,
    "obstore": ObstoreClient,
    "sdk": SdkClient,
}

"""Peers without torch.distributed.checkpoint: one blob for each tensor, through obstore and through the SDK."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import obstore
import torch
from azure.identity import DefaultAzureCredential
from azure.storage.blob import ContainerClient
from obstore.auth.azure import AzureCredentialProvider
from obstore.store import AzureStore
from torch.distributed.checkpoint import LoadPlanner

from azure_torch_ckpt.dcp.tensors.memory import writable
from tests.benchmarks.spec import MIB, Address, Case
from tests.benchmarks.works import State

if TYPE_CHECKING:
    from obstore.store import ClientConfig

_BLOCK = 32 * MIB
# Of a range that obstore downloads: all that are under way are held in memory beside the tensors.
_RANGE = 8 * MIB


class ObstoreClient:
    """obstore's ``put`` and ``get_range``; what was got is copied into the tensor."""

    def __init__(self, case: Case, address: Address) -> None:
        options: ClientConfig = {"timeout": "120s", "allow_http": True}
        if address.ca_file is not None:
            options["root_certificate"] = Path(address.ca_file).read_bytes()
        account: dict[str, Any]
        if address.key is None:
            name = address.account.partition("://")[2].partition(".")[0]
            account = {"account_name": name, "credential_provider": AzureCredentialProvider()}
        else:
            account = {
                "account_name": address.account.rpartition("/")[2],
                "account_key": address.key,
                "endpoint": address.account,
            }
        self._store = AzureStore(address.container, client_options=options, **account)
        self._connections = case.connections

    def save(self, state: State, path: str) -> None:
        concurrency = max(self._connections // len(state), 1)
        _run(
            (
                partial(
                    obstore.put,
                    self._store,
                    f"{path}/{name}",
                    writable(tensor),
                    chunk_size=_BLOCK,
                    max_concurrency=concurrency,
                )
                for name, tensor in state.items()
            ),
            self._connections,
        )

    def load(self, state: State, path: str, planner: LoadPlanner | None) -> None:
        def fetch(name: str, view: memoryview, start: int) -> None:
            view[:] = memoryview(obstore.get_range(self._store, f"{path}/{name}", start=start, length=len(view)))

        _run(
            (
                partial(fetch, name, writable(tensor)[start : start + _RANGE], start)
                for name, tensor in state.items()
                for start in range(0, tensor.nbytes, _RANGE)
            ),
            self._connections,
        )


class SdkClient:
    """``upload_blob`` and ``download_blob`` of azure-storage-blob, with as many connections as it can use."""

    def __init__(self, case: Case, address: Address) -> None:
        self._container = ContainerClient(
            address.account,
            address.container,
            credential=DefaultAzureCredential() if address.key is None else address.key,
            connection_verify=address.ca_file or True,
            max_block_size=_BLOCK,
            max_chunk_get_size=_BLOCK,
        )
        self._connections = case.connections

    def save(self, state: State, path: str) -> None:
        threads = min(len(state), self._connections)

        def upload(name: str, tensor: torch.Tensor) -> None:
            self._container.get_blob_client(f"{path}/{name}").upload_blob(
                _Stream(writable(tensor)),
                length=tensor.nbytes,
                max_concurrency=max(self._connections // threads, 1),
                overwrite=True,
            )

        _run((partial(upload, name, tensor) for name, tensor in state.items()), threads)

    def load(self, state: State, path: str, planner: LoadPlanner | None) -> None:
        threads = min(len(state), self._connections)

        def download(name: str, tensor: torch.Tensor) -> None:
            concurrency = max(self._connections // threads, 1)
            blob = self._container.get_blob_client(f"{path}/{name}")
            stream = cast(IO[bytes], _Stream(writable(tensor)))
            blob.download_blob(max_concurrency=concurrency).readinto(stream)

        _run((partial(download, name, tensor) for name, tensor in state.items()), threads)


class _Stream(io.RawIOBase):
    """A tensor's memory as a file of fixed size."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._position = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        piece = self._view[self._position : self._position + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def write(self, data: Any) -> int:
        self._view[self._position : self._position + len(data)] = data
        self._position += len(data)
        return len(data)


def _run(tasks: Iterable[Callable[[], Any]], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()

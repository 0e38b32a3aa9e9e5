"""`ContainerConnection`: the clients for one container, made in each process when needed, and their errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from azure.core.exceptions import AzureError
from azure.storage.blob import BlobClient, ContainerClient

from azure_torch_ckpt.blobs.direct_requests import USER_AGENT, DirectRequests
from azure_torch_ckpt.blobs.error_translation import translate
from azure_torch_ckpt.credentials import Access, environment_note, resolve
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.transport.buffers import Doubt
from azure_torch_ckpt.transport.gather_transport import GatherTransport
from azure_torch_ckpt.transport.retry import RetryPolicy
from azure_torch_ckpt.transport.throttle import RequestCounts, Throttle

__all__ = ["ContainerConnection"]

# Larger than any blob (about 190.7 TiB), so that the SDK sends one request for one call.
_ONE_REQUEST = 1 << 48
_KEPT_CLIENTS = 64


class ContainerConnection:
    """Base of `BlobStore`, which documents the arguments."""

    def __init__(
        self,
        location: BlobLocation,
        access: Access | None = None,
    ) -> None:
        self.location = location.container_root()
        self.access = access = access or Access()
        # Refuses a wrong credential now, not in a worker thread later.
        self._credential = resolve(location, access.credential)
        self._client: ContainerClient | None = None
        self._requests: DirectRequests | None = None
        self._blobs: dict[str, BlobClient] = {}  # by the blob's path
        self._transport = GatherTransport(ca_file=access.ca_file)
        self.throttle = Throttle()
        self.has_directories: bool | None = None
        """Whether the account has a hierarchical namespace; None while that is unknown."""

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "access": self.access}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["location"], state["access"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"BlobStore({str(self.location)!r})"

    def _container(self) -> ContainerClient:
        # Without a lock, because a fork might copy it held. Two threads that come first make a client each, and one
        # stays.
        client = self._client
        if client is None:
            self._client = client = ContainerClient(
                self.location.endpoint,
                self.location.container,
                credential=self._credential,
                transport=self._transport,
                retry_policy=RetryPolicy(self.options.retry_seconds, self.throttle),
                user_agent=USER_AGENT,
                max_single_get_size=_ONE_REQUEST,
                max_single_put_size=_ONE_REQUEST,
            )
        return client

    def _direct(self) -> DirectRequests:
        # Without a lock, as above.
        direct = self._requests
        if direct is None:
            self._requests = direct = DirectRequests(
                self._credential,
                self._transport,
                RetryPolicy(self.options.retry_seconds, self.throttle),
                self._container().api_version,
            )
        return direct

    def _blob(self, path: str, moment: BlobLocation | None = None) -> BlobClient:
        if moment is None:
            # Several requests for one blob follow each other, and a client costs a fifth of the CPU time of a request.
            client = self._blobs.get(path)
            if client is None:
                client = self._container().get_blob_client(path)
                if len(self._blobs) >= _KEPT_CLIENTS:
                    self._blobs = {}
                self._blobs[path] = client
            return client
        # The declared type of `snapshot` lacks None, which is its default.
        return self._container().get_blob_client(path, moment.snapshot or "", version_id=moment.version_id)

    @property
    def options(self) -> TransferOptions:
        return self.access.options

    @property
    def counts(self) -> RequestCounts:
        """How many requests this store has sent in this process, and how many of them were retries."""
        return self.throttle.counts

    @contextlib.contextmanager
    def _translated(self, doing: str, path: str, doubt: Doubt | None = None) -> Iterator[None]:
        try:
            yield
        except AzureError as error:
            where = f"{self.location}/{path}" if path else str(self.location)
            note = environment_note(self.location, self.access.credential)
            anonymous = self._credential is None
            translated = translate(error, f"could not {doing} {where}", self.location, anonymous=anonymous, note=note)
            if doubt is not None:
                translated.may_be_done = doubt.exists
            raise translated from error

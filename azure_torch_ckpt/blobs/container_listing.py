"""`ContainerListing`: the blobs of one container, and the service's clock, by List Blobs."""

from __future__ import annotations

import datetime
import email.utils
import itertools
from collections.abc import Iterator
from typing import Any

from azure.core.exceptions import AzureError
from azure.core.paging import ItemPaged
from azure.core.rest import HttpResponse

from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.container import ContainerConnection
from azure_torch_ckpt.blobs.list_page import ListPage
from azure_torch_ckpt.errors import RequestRefusedError

__all__ = ["ContainerListing"]


class ContainerListing(ContainerConnection):
    """Base of `BlobStore`: its verbs that list."""

    def list(self, prefix: str, *, limit: int | None = None) -> Iterator[BlobInfo]:
        """List Blobs: yield all blobs whose names start with `prefix`, in the order of their names, 5,000 to a request.

        They include the folders that are blobs: `BlobInfo.is_folder`.

        Args:
            limit: the largest number of blobs.
        """
        for entry in itertools.islice(self._listed(prefix, limit=limit), limit):
            assert isinstance(entry, BlobInfo)
            yield entry

    def list_folder(self, prefix: str) -> Iterator[BlobInfo | str]:
        """List Blobs with the delimiter "/": yield blobs directly under `prefix`, and prefixes (str, ending in "/")."""
        return self._listed(prefix, delimiter="/")

    def now(self, prefix: str = "") -> datetime.datetime:
        """Return the time of the service's clock, which also sets `BlobInfo.last_modified`.

        Args:
            prefix: of a listing that the credential allows: a SAS may be for one directory only.
        """
        date = self._list_page(prefix, limit=1).headers.get("Date")
        if date is None:
            raise RequestRefusedError(f"could not get the time: {self.location.endpoint} sends no Date header")
        return email.utils.parsedate_to_datetime(date)

    def _listed(
        self, prefix: str, *, delimiter: str | None = None, limit: int | None = None
    ) -> Iterator[BlobInfo | str]:
        marker = ""
        while True:
            response = self._list_page(prefix, delimiter=delimiter, limit=limit, marker=marker)
            page = ListPage(response.content)
            try:
                yield from page
                if page.marker and page.marker == marker:
                    raise ValueError("its next page is itself")
            except ValueError as error:
                raise RequestRefusedError(
                    f"could not list {self.location}/{prefix}: the answer is not a listing ({error}). Check the URL, "
                    "and the proxies between this machine and the service"
                ) from error
            if not page.marker:
                return
            marker = page.marker

    def _list_page(
        self, prefix: str, *, delimiter: str | None = None, limit: int | None = None, marker: str = ""
    ) -> HttpResponse:
        with self._translated("list", prefix):
            container = self._container()
            response = self._direct().list_page(container.url, prefix, delimiter=delimiter, limit=limit, marker=marker)
            if response is not None:
                return response
            # The client parses the page itself, slowly. The page that it received is the same.
            answers: list[HttpResponse] = []
            options: dict[str, Any] = {
                "name_starts_with": prefix or None,
                "include": "metadata",
                "results_per_page": limit,
                "answers": answers,
            }
            pages: ItemPaged[Any]
            if delimiter is None:
                pages = container.list_blobs(**options)
            else:
                pages = container.walk_blobs(delimiter=delimiter, **options)
            try:
                next(pages.by_page(marker or None), None)
            except AzureError:
                if not answers or answers[-1].status_code >= 300:
                    raise
                # An answer came and is not a listing: the caller reports that.
            return answers[-1]  # earlier ones may be answers of a proxy

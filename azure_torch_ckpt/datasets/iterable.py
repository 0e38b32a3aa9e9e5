"""Blobs one after the other: `IterableBlobDataset`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.datasets.blob import Blob
from azure_torch_ckpt.datasets.listing import BlobListing
from azure_torch_ckpt.datasets.progress import Cursor, OrderSettings, Plan, split_settings
from azure_torch_ckpt.datasets.samples import Failure, Samples, SampleSettings
from azure_torch_ckpt.datasets.stream import Stream
from azure_torch_ckpt.location import BlobLocation

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["IterableBlobDataset"]

_T_co = TypeVar("_T_co", covariant=True)


class _Settings(OrderSettings, SampleSettings, total=False):
    pass


class IterableBlobDataset(Stream[_T_co]):
    """An iterable dataset: the blobs of a listing, transformed, with the next ones being fetched meanwhile.

        dataset = IterableBlobDataset.from_container_url(url, transform=decode, shuffle=True, batch_size=32)
        loader = DataLoader(dataset, batch_size=32, num_workers=4)
        for epoch in range(10):
            dataset.set_epoch(epoch)
            for batch in loader: ...

    Every blob goes to exactly one rank and worker (see `Share` for uneven numbers).

    Args:
        listing: the blobs.
        credential: see `azure_torch_ckpt.credentials.resolve`; a SAS in a URL wins.
        transform: makes a sample of a `Blob`. Without one, it is ``{"url": str, "data": bytes}``.
        settings: see `OrderSettings` and `SampleSettings`.
    """

    def __init__(
        self,
        listing: BlobListing,
        *,
        credential: Credential = None,
        transform: Callable[[Blob], _T_co] | None = None,
        **settings: Unpack[_Settings],
    ) -> None:
        order, reading = split_settings(settings)
        super().__init__(listing, Plan.make(listing, **order))
        self._samples = Samples.make(credential, transform, reading)

    @classmethod
    def from_blob_urls(
        cls,
        blob_urls: str | Iterable[str | os.PathLike[str] | BlobLocation],
        *,
        credential: Credential = None,
        transform: Callable[[Blob], _T_co] | None = None,
        **settings: Unpack[_Settings],
    ) -> Self:
        """The blobs at these URLs, which may have SAS, snapshots and versions; see `BlobListing.from_blob_urls`."""
        listing = BlobListing.from_blob_urls(blob_urls)
        return cls(listing, credential=credential, transform=transform, **settings)

    @classmethod
    def from_container_url(
        cls,
        container_url: str | os.PathLike[str] | BlobLocation,
        *,
        prefix: str | None = None,
        glob: str | None = None,
        suffix: str | tuple[str, ...] | None = None,
        credential: Credential = None,
        transform: Callable[[Blob], _T_co] | None = None,
        **settings: Unpack[_Settings],
    ) -> Self:
        """The blobs of a container, listed now, and not in every worker; see `BlobListing.from_container_url`."""
        listing = BlobListing.from_container_url(
            container_url,
            prefix=prefix,
            glob=glob,
            suffix=suffix,
            credential=credential,
            options=settings.get("options"),
            ca_file=settings.get("ca_file"),
        )
        return cls(listing, credential=credential, transform=transform, **settings)

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch, skipped ones included."""
        return len(self._progress.plan.share(0))

    @property
    def skipped(self) -> int:
        """Blobs left out so far, in all worker processes together."""
        return self._samples.skipped

    def state_at(self, samples: int) -> dict[str, Any]:
        """`state_dict` for a DataLoader with workers, where this rank was trained with `samples` samples of this pass.

        For a dataset with the DataLoader's `batch_size`, of which no blob was skipped. It can be loaded with any
        numbers of workers and ranks.
        """
        return self._progress.state_at(samples)

    def _read(self, cursor: Cursor) -> Iterator[_T_co]:
        blobs = (self.listing[cursor.index(position)] for position in range(cursor.position, len(cursor.share)))
        for outcome in self._samples.many(blobs):
            cursor.position += 1
            if not isinstance(outcome, Failure):
                yield outcome

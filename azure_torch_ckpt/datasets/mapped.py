"""Blobs by their number: `BlobDataset`, and the `BlobSampler` that shards, shuffles and resumes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from torch.utils.data import Dataset, Sampler

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.datasets.blob import Blob
from azure_torch_ckpt.datasets.listing import BlobListing
from azure_torch_ckpt.datasets.order import Uneven
from azure_torch_ckpt.datasets.progress import Cursor, Plan, Progress
from azure_torch_ckpt.datasets.samples import Failure, Samples, SampleSettings
from azure_torch_ckpt.location import BlobLocation

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["BlobDataset", "BlobSampler"]

_T_co = TypeVar("_T_co", covariant=True)


class BlobDataset(Dataset[_T_co]):
    """A map-style dataset: sample ``i`` is the ``i``-th blob of a listing, transformed.

        dataset = BlobDataset.from_container_url(url, prefix="train/", suffix=".jpg", transform=decode)
        sampler = BlobSampler(dataset, shuffle=True)
        loader = DataLoader(dataset, batch_size=32, sampler=sampler, num_workers=4)

    A DataLoader's batch is fetched in parallel. Where blobs are skipped, they are missing from their batch, and a
    batch of which none is left raises the error of the last; ``dataset[i]`` raises always.

    Args:
        listing: the blobs.
        credential: see `azure_torch_ckpt.credentials.resolve`; a SAS in a URL wins.
        transform: makes a sample of a `Blob`. Without one, it is ``{"url": str, "data": bytes}``.
        settings: see `SampleSettings`.
    """

    def __init__(
        self,
        listing: BlobListing,
        *,
        credential: Credential = None,
        transform: Callable[[Blob], _T_co] | None = None,
        **settings: Unpack[SampleSettings],
    ) -> None:
        self.listing = listing
        self._samples = Samples.make(credential, transform, settings)

    @classmethod
    def from_blob_urls(
        cls,
        blob_urls: str | Iterable[str | os.PathLike[str] | BlobLocation],
        *,
        credential: Credential = None,
        transform: Callable[[Blob], _T_co] | None = None,
        **settings: Unpack[SampleSettings],
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
        **settings: Unpack[SampleSettings],
    ) -> Self:
        """The blobs of a container, listed now; see `BlobListing.from_container_url`."""
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
        return len(self.listing)

    def __getitem__(self, index: int) -> _T_co:
        return self._samples.one(self.listing[index])

    def __getitems__(self, indices: list[int]) -> list[_T_co]:
        """The samples of a batch; `torch.utils.data.DataLoader` calls it."""
        outcomes = list(self._samples.many(self.listing[index] for index in indices))
        samples = [outcome for outcome in outcomes if not isinstance(outcome, Failure)]
        if not samples and outcomes and isinstance(outcomes[-1], Failure):
            raise outcomes[-1].error
        return samples

    @property
    def skipped(self) -> int:
        """Blobs left out so far, in all worker processes together."""
        return self._samples.skipped


class BlobSampler(Sampler[int]):
    """Which samples of a `BlobDataset` this rank reads, in which order; for ``DataLoader(sampler=)``.

    What `torch.utils.data.DistributedSampler` does, and more: no sample is repeated unless ``uneven="pad"``, the order
    of an epoch can be resumed in its middle, on other numbers of ranks, too, and it costs no memory.

    Args:
        dataset: its listing is what counts.
        shuffle, seed, rank, world_size, uneven: see `OrderSettings`.
    """

    def __init__(
        self,
        dataset: BlobDataset[Any],
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        uneven: Uneven = "keep",
    ) -> None:
        self._progress = Progress(
            Plan.make(dataset.listing, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, uneven=uneven)
        )

    def __iter__(self) -> Iterator[int]:
        return self._run(self._progress.begin())

    def _run(self, cursor: Cursor) -> Iterator[int]:
        while cursor.position < len(cursor.share):
            cursor.position += 1
            yield cursor.index(cursor.position - 1)

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch."""
        return len(self._progress.plan.share(0))

    def set_epoch(self, epoch: int) -> None:
        """Turn to an epoch; the one that was loaded goes on where the state was taken."""
        self._progress.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """How far the epoch has been handed out, which is ahead of the training if the DataLoader has workers."""
        return self._progress.state_dict()

    def state_at(self, samples: int) -> dict[str, Any]:
        """What `state_dict` is when this rank has been trained with the first `samples` samples of the epoch."""
        return self._progress.state_at(samples)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next pass goes on where the state was taken.

        Raises:
            ValueError: the state is of another dataset or order.
        """
        self._progress.load_state_dict(state_dict)

"""Blobs by their number: `BlobDataset`, and the `BlobSampler` that shards, shuffles and resumes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from torch.utils.data import Dataset, Sampler

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.datasets.blob import Blob
from azure_torch_ckpt.datasets.listing import BlobListing
from azure_torch_ckpt.datasets.order import Uneven
from azure_torch_ckpt.datasets.progress import Cursor, Place, Plan, Progress
from azure_torch_ckpt.datasets.reading import Reading, SampleSettings
from azure_torch_ckpt.datasets.samples import Failure, Samples
from azure_torch_ckpt.datasets.sources import FromListing

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BlobDataset", "BlobSampler"]

_T_co = TypeVar("_T_co", covariant=True)


class BlobDataset(FromListing[Blob, _T_co], Dataset[_T_co]):
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
        self._samples = Samples(Reading(credential, **settings), transform)

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
        for position in range(cursor.place.position, len(cursor.share)):
            cursor.place = Place(position + 1)
            yield cursor.index(position)

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

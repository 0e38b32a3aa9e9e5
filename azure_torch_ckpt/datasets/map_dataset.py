"""`BlobDataset`: blobs by their index; and `BlobSampler`, which shards, shuffles and resumes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from torch.utils.data import Dataset, Sampler

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.datasets.base import ListingDataset
from azure_torch_ckpt.datasets.blob import Blob, BlobFetcher, SampleSettings
from azure_torch_ckpt.datasets.blob_samples import BlobSamples, FailedSample
from azure_torch_ckpt.datasets.epoch_state import Cursor, EpochState, StreamPosition
from azure_torch_ckpt.datasets.listing import BlobListing
from azure_torch_ckpt.datasets.order import EpochOrder, Uneven

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BlobDataset", "BlobSampler"]

_T_co = TypeVar("_T_co", covariant=True)


class BlobDataset(ListingDataset[Blob, _T_co], Dataset[_T_co]):
    """A map-style dataset: sample ``i`` is the ``i``-th blob of a listing, transformed.

        dataset = BlobDataset.from_container_url(url, prefix="train/", suffix=".jpg", transform=decode)
        sampler = BlobSampler(dataset, shuffle=True)
        loader = DataLoader(dataset, batch_size=32, sampler=sampler, num_workers=4)

    The blobs of a DataLoader's batch are fetched in parallel. Skipped blobs are missing from their batch, and a batch
    without any other blob raises the last error. ``dataset[i]`` always raises.

    Args:
        listing: the blobs.
        credential: see `azure_torch_ckpt.credentials.resolve`; a SAS in a URL takes precedence.
        transform: makes a sample of a `Blob`. Without one, a sample is ``{"url": str, "data": bytes}``.
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
        self._fetcher = BlobFetcher(credential, **settings)
        self._samples = BlobSamples(self._fetcher, transform)

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> _T_co:
        return self._samples.one(self.listing[index])

    def __getitems__(self, indices: list[int]) -> list[_T_co]:
        """Return the samples of a batch; `torch.utils.data.DataLoader` calls this."""
        outcomes = list(self._samples.many(self.listing[index] for index in indices))
        samples = [outcome for outcome in outcomes if not isinstance(outcome, FailedSample)]
        if not samples and outcomes and isinstance(outcomes[-1], FailedSample):
            raise outcomes[-1].error
        return samples


class BlobSampler(Sampler[int]):
    """Yields the indices of a `BlobDataset` that this rank reads, in their order, for ``DataLoader(sampler=)``.

    It does what `torch.utils.data.DistributedSampler` does. In addition, it repeats no sample unless ``uneven="pad"``,
    its epochs can be resumed in the middle and on another number of ranks, and the order costs no memory.

    Args:
        dataset: the dataset whose listing is sampled.
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
        order = EpochOrder.make(
            dataset.listing, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, uneven=uneven
        )
        self._epochs = EpochState(order)

    def __iter__(self) -> Iterator[int]:
        return self._run(self._epochs.begin_pass())

    def _run(self, cursor: Cursor) -> Iterator[int]:
        for position in range(cursor.place.position, len(cursor.share)):
            cursor.place = StreamPosition(position + 1)
            yield cursor.index(position)

    def __len__(self) -> int:
        """The number of samples of this rank in a whole epoch."""
        return len(self._epochs.order.share(0))

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch. The epoch of a loaded state continues where the state was taken."""
        self._epochs.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return how much of the epoch was yielded. If the DataLoader has workers, this is ahead of the training."""
        return self._epochs.state_dict()

    def state_at(self, samples: int) -> dict[str, Any]:
        """Return the `state_dict` after this rank was trained with the first `samples` samples of the epoch."""
        return self._epochs.state_at(samples)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next pass continue where the state was taken.

        Raises:
            ValueError: the state is of another dataset or order.
        """
        self._epochs.load_state_dict(state_dict)

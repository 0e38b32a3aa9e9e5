"""`IterableBlobDataset`: blobs one after the other; `BlobDataset`: by their index, with its `BlobSampler`."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from torch.utils.data import Dataset, Sampler

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.datasets.base import ListingDataset, Resumable, StreamDataset
from azure_torch_ckpt.datasets.blob import Blob, BlobFetcher, SampleSettings, prefetch
from azure_torch_ckpt.datasets.epoch_state import Cursor, StreamPosition
from azure_torch_ckpt.datasets.listing import BlobListing, ListedBlob
from azure_torch_ckpt.datasets.order import OrderSettings, Uneven, split_settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BlobDataset", "BlobSampler", "BlobSamples", "FailedSample", "IterableBlobDataset"]

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)

# The assumed size of a blob whose size is not known: one request of `BlobIO`.
_UNKNOWN_SIZE = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class FailedSample:
    """Takes the place of a sample that cannot be made."""

    error: Exception


class BlobSamples(Generic[_T]):
    """Makes samples of blobs with one transform."""

    def __init__(self, fetcher: BlobFetcher, transform: Callable[[Blob], _T] | None) -> None:
        self._fetcher = fetcher
        self._transform = transform or cast("Callable[[Blob], _T]", _url_and_data)

    def one(self, blob: ListedBlob) -> _T:
        """Return the sample of one blob; raise the error of reading or of the transform, even if others are skipped."""
        outcome = self._attempt(blob, None)
        if isinstance(outcome, FailedSample):
            raise outcome.error
        return outcome

    def many(self, blobs: Iterable[ListedBlob]) -> Iterator[_T | FailedSample]:
        """Yield the samples in order, and a `FailedSample`, counted and logged, for each skipped blob.

        An error of reading or of the transform is raised, unless the blob is skipped.
        """
        entered: deque[ListedBlob] = deque()  # blobs that `prefetch` has taken and not yielded yet
        jobs = (self._job(blob, entered) for blob in blobs)
        for future in prefetch(jobs, self._fetcher.concurrency, self._fetcher.prefetch_bytes):
            blob = entered.popleft()
            error = future.exception()
            if error is None:
                outcome = self._attempt(blob, future.result())
            elif isinstance(error, Exception):
                outcome = self._attempt(blob, None, error)
            else:
                raise error
            if isinstance(outcome, FailedSample):
                self._fetcher.skip_or_raise(outcome.error, blob.location)
            yield outcome

    def _job(self, blob: ListedBlob, entered: deque[ListedBlob]) -> tuple[int, Callable[[], bytes | None]]:
        entered.append(blob)
        size = _UNKNOWN_SIZE if blob.size is None else blob.size
        if size > self._fetcher.prefetch_bytes:
            return 0, _nothing
        return size, functools.partial(self._fetcher.read, blob)

    def _attempt(self, blob: ListedBlob, data: bytes | None, error: Exception | None = None) -> _T | FailedSample:
        """Transform the prefetched `data` or, after the `error` of prefetching, fetch and transform the blob."""
        for _ in range(self._fetcher.retries + (error is None)):
            try:
                return self._transform(Blob(blob, self._fetcher, data))
            except Exception as newer:
                error, data = newer, None
        assert error is not None
        return FailedSample(error)


def _url_and_data(blob: Blob) -> dict[str, Any]:
    return {"url": blob.url, "data": blob.read()}


def _nothing() -> None:
    return None


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


class BlobSampler(Resumable[int], Sampler[int]):
    """Yields the indices of a `BlobDataset` that this rank reads, in their order, for ``DataLoader(sampler=)``.

    It does what `torch.utils.data.DistributedSampler` does. In addition, it repeats no sample unless ``uneven="pad"``,
    its epochs can be resumed in the middle and on another number of ranks, and the order costs no memory. If the
    DataLoader has workers, `state_dict` is ahead of the training, and `state_at` is not.

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
        super().__init__(dataset.listing, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, uneven=uneven)

    def _read(self, cursor: Cursor) -> Iterator[int]:
        for position in range(cursor.place.position, len(cursor.share)):
            cursor.place = StreamPosition(position + 1)
            yield cursor.index(position)

    def __len__(self) -> int:
        """The number of samples of this rank in a whole epoch."""
        return len(self._epochs.order.share(0))

    def state_at(self, samples: int) -> dict[str, Any]:
        """Return the `state_dict` after this rank was trained with the first `samples` samples of the epoch."""
        return self._epochs.state_at(samples)


class _IterableSettings(OrderSettings, SampleSettings, total=False):
    pass


class IterableBlobDataset(StreamDataset[Blob, _T_co]):
    """An iterable dataset that transforms the blobs of a listing, and fetches the next ones meanwhile.

        dataset = IterableBlobDataset.from_container_url(url, transform=decode, shuffle=True, batch_size=32)
        loader = DataLoader(dataset, batch_size=32, num_workers=4)
        for epoch in range(10):
            dataset.set_epoch(epoch)
            for batch in loader: ...

    Exactly one rank and worker reads each blob (see `Share` for uneven numbers).

    Args:
        listing: the blobs.
        credential: see `azure_torch_ckpt.credentials.resolve`; a SAS in a URL takes precedence.
        transform: makes a sample of a `Blob`. Without one, a sample is ``{"url": str, "data": bytes}``.
        settings: see `OrderSettings` and `SampleSettings`.
    """

    def __init__(
        self,
        listing: BlobListing,
        *,
        credential: Credential = None,
        transform: Callable[[Blob], _T_co] | None = None,
        **settings: Unpack[_IterableSettings],
    ) -> None:
        order, rest = split_settings(settings)
        super().__init__(listing, **order)
        self._fetcher = BlobFetcher(credential, **rest)
        self._samples = BlobSamples(self._fetcher, transform)

    def __len__(self) -> int:
        """The number of samples of this rank in a whole epoch, including skipped ones."""
        return len(self._epochs.order.share(0))

    def state_at(self, samples: int) -> dict[str, Any]:
        """Return the `state_dict` for a DataLoader with workers, after `samples` samples of this rank in this pass.

        The dataset must have the DataLoader's `batch_size`, and must not have skipped a blob. The state can be loaded
        with any numbers of workers and ranks.
        """
        return self._epochs.state_at(samples)

    def _read(self, cursor: Cursor) -> Iterator[_T_co]:
        begin = cursor.place.position
        blobs = (self.listing[cursor.index(position)] for position in range(begin, len(cursor.share)))
        for position, outcome in enumerate(self._samples.many(blobs), begin):
            cursor.place = StreamPosition(position + 1)
            if not isinstance(outcome, FailedSample):
                yield outcome

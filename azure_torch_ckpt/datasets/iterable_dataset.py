"""`IterableBlobDataset`: blobs one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.datasets.base import StreamDataset
from azure_torch_ckpt.datasets.blob import Blob, BlobFetcher, SampleSettings
from azure_torch_ckpt.datasets.blob_samples import BlobSamples, FailedSample
from azure_torch_ckpt.datasets.epoch_state import Cursor, StreamPosition
from azure_torch_ckpt.datasets.listing import BlobListing
from azure_torch_ckpt.datasets.order import OrderSettings, split_settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["IterableBlobDataset"]

_T_co = TypeVar("_T_co", covariant=True)


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

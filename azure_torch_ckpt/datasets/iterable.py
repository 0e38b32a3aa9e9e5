"""Blobs one after the other: `IterableBlobDataset`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.datasets.blob import Blob
from azure_torch_ckpt.datasets.listing import BlobListing
from azure_torch_ckpt.datasets.progress import Cursor, OrderSettings, Place, Plan, split_settings
from azure_torch_ckpt.datasets.reading import Reading, SampleSettings
from azure_torch_ckpt.datasets.samples import Failure, Samples
from azure_torch_ckpt.datasets.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["IterableBlobDataset"]

_T_co = TypeVar("_T_co", covariant=True)


class _Settings(OrderSettings, SampleSettings, total=False):
    pass


class IterableBlobDataset(Stream[Blob, _T_co]):
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
        self._samples = Samples(Reading(credential, **reading), transform)

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
        begin = cursor.place.position
        blobs = (self.listing[cursor.index(position)] for position in range(begin, len(cursor.share)))
        for position, outcome in enumerate(self._samples.many(blobs), begin):
            cursor.place = Place(position + 1)
            if not isinstance(outcome, Failure):
                yield outcome

"""What the datasets have in common: constructors and the count of skipped blobs; epochs and states of streams."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch.utils.data import IterableDataset

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.datasets.blob import BlobFetcher, SampleSettings
from azure_torch_ckpt.datasets.epoch_state import Cursor, EpochState
from azure_torch_ckpt.datasets.listing import BlobListing
from azure_torch_ckpt.datasets.order import EpochOrder, OrderSettings
from azure_torch_ckpt.location import BlobLocation

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["ListingDataset", "Resumable", "StreamDataset", "TarSettings"]

_Input = TypeVar("_Input")
_T_co = TypeVar("_T_co", covariant=True)


class TarSettings(OrderSettings, SampleSettings, total=False):
    """Arguments of `TarDataset`; the other datasets take those that they name.

    Attributes:
        group: make one sample of the members with the same key; if False, each member is a sample.
        shuffle_buffer: how many samples are held and shuffled among themselves; see `shuffled`.
    """

    group: bool
    shuffle_buffer: int


class ListingDataset(Generic[_Input, _T_co]):
    """Base of all datasets. A `transform` turns what the class reads (`_Input`) into samples."""

    _suffix: ClassVar[str | tuple[str, ...]] = ""
    _fetcher: BlobFetcher

    if TYPE_CHECKING:

        def __init__(
            self,
            listing: BlobListing,
            *,
            credential: Credential = None,
            transform: Callable[[_Input], _T_co] | None = None,
            **settings: Unpack[TarSettings],
        ) -> None: ...

    @classmethod
    def from_blob_urls(
        cls,
        blob_urls: str | Iterable[str | os.PathLike[str] | BlobLocation],
        *,
        credential: Credential = None,
        transform: Callable[[_Input], _T_co] | None = None,
        **settings: Unpack[TarSettings],
    ) -> Self:
        """Make a dataset of the blobs at these URLs, which may have SAS, snapshots and versions.

        Args:
            blob_urls: see `BlobListing.from_blob_urls`.
            settings: those of the class.
        """
        return cls(BlobListing.from_blob_urls(blob_urls), credential=credential, transform=transform, **settings)

    @classmethod
    def from_container_url(
        cls,
        container_url: str | os.PathLike[str] | BlobLocation,
        *,
        prefix: str | None = None,
        glob: str | None = None,
        suffix: str | tuple[str, ...] | None = None,
        credential: Credential = None,
        transform: Callable[[_Input], _T_co] | None = None,
        **settings: Unpack[TarSettings],
    ) -> Self:
        """Make a dataset of the blobs of a container. The container is listed now, and not again in every worker.

        Args:
            container_url, prefix, glob: see `BlobListing.from_container_url`.
            suffix: None for the files that the class reads: ``(".tar", ".tar.gz", ".tgz")`` for `TarDataset`, else all.
            settings: those of the class.
        """
        listing = BlobListing.from_container_url(
            container_url,
            prefix=prefix,
            glob=glob,
            suffix=cls._suffix if suffix is None else suffix,
            credential=credential,
            options=settings.get("options"),
            ca_file=settings.get("ca_file"),
        )
        return cls(listing, credential=credential, transform=transform, **settings)

    @property
    def skipped(self) -> int:
        """How many blobs (for `TarDataset`: samples and rests of shards) all workers together have skipped."""
        return self._fetcher.skipped


class Resumable(Generic[_T_co]):
    """Base of what reads a listing in an order: ranks and workers share the epochs, and passes can be resumed."""

    def __init__(self, listing: BlobListing, **order: Unpack[OrderSettings]) -> None:
        self._epochs = EpochState(EpochOrder.make(listing, **order))

    def __iter__(self) -> Iterator[_T_co]:
        # Not a generator: a loaded state is for the pass that begins here, whenever its first sample is requested.
        return self._read(self._epochs.begin_pass())

    @abstractmethod
    def _read(self, cursor: Cursor) -> Iterator[_T_co]:
        """Yield the samples from the cursor on. The cursor advances before each sample, and not before an error."""

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, in this process and in all workers, including persistent ones. Call it before each pass.

        The epoch of a loaded state continues where the state was taken; any other one starts at its beginning.
        """
        self._epochs.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return how far this process has read.

        Raises:
            ValueError: workers read the dataset. They are ahead of the training, and this process does not know how
                far.
        """
        return self._epochs.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next pass continue where the state was taken.

        Raises:
            ValueError: the state is of another dataset or order, or of another number of workers or ranks that it
                depends on.
        """
        self._epochs.load_state_dict(state_dict)


class StreamDataset(ListingDataset[_Input, _T_co], Resumable[_T_co], IterableDataset[_T_co]):
    """Base of `IterableBlobDataset` and `TarDataset`."""

    def __init__(self, listing: BlobListing, **order: Unpack[OrderSettings]) -> None:
        super().__init__(listing, **order)
        self.listing = listing

"""The constructors of all datasets: from a container, from URLs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.datasets.listing import BlobListing
from azure_torch_ckpt.datasets.progress import OrderSettings
from azure_torch_ckpt.datasets.reading import SampleSettings
from azure_torch_ckpt.location import BlobLocation

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["FromListing", "TarSettings"]

_Input = TypeVar("_Input")
_T_co = TypeVar("_T_co", covariant=True)


class TarSettings(OrderSettings, SampleSettings, total=False):
    """Arguments of `TarDataset`; of these, the others take those that they name.

    Attributes:
        group: give samples, of the members with the same key; else the members one by one.
        shuffle_buffer: how many samples are held and shuffled among themselves; see `shuffled`.
    """

    group: bool
    shuffle_buffer: int


class FromListing(Generic[_Input, _T_co]):
    """A dataset of a listing, whose `transform` makes samples of what the class reads (`_Input`)."""

    _suffix: ClassVar[str | tuple[str, ...]] = ""

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
        """The blobs at these URLs, which may have SAS, snapshots and versions; see `BlobListing.from_blob_urls`.

        Args:
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
        """The blobs of a container, listed now, and not in every worker; see `BlobListing.from_container_url`.

        Args:
            suffix: None for what the class reads: of `TarDataset` ``(".tar", ".tar.gz", ".tgz")``, else everything.
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

"""Samples in tar files, as WebDataset lays them out: `TarDataset`."""

from __future__ import annotations

import gzip
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.datasets.blob import Access, Blob
from azure_torch_ckpt.datasets.listing import BlobListing
from azure_torch_ckpt.datasets.progress import Cursor, OrderSettings, Plan, Tally, split_settings
from azure_torch_ckpt.datasets.samples import AccessSettings, OnError, check_on_error
from azure_torch_ckpt.datasets.stream import Stream
from azure_torch_ckpt.location import BlobLocation

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["TarDataset"]

_log = logging.getLogger(__name__)
_T_co = TypeVar("_T_co", covariant=True)
_Sample = dict[str, Any]


class _Settings(OrderSettings, AccessSettings, total=False):
    on_error: OnError


class TarDataset(Stream[_T_co]):
    """An iterable dataset of the samples in tar files ("shards"), in the layout of WebDataset.

        dataset = TarDataset.from_container_url(url, prefix="train-", transform=decode, shuffle=True)

    Files that follow each other and whose paths are the same up to the first dot of the name make a sample:
    ``{"__key__": "dir/0001", "__url__": url of the tar file, "jpg": bytes, "cls": bytes}``. Names end in ``.tar``,
    ``.tar.gz`` or ``.tgz``. Ranks and workers share whole tar files, so what is said about uneven numbers, and the
    shuffling, is about those: have many more than ranks times workers. Within one, samples come in their order.

    Args:
        listing: the tar files.
        credential: see `azure_torch_ckpt.credentials.resolve`; a SAS in a URL wins.
        transform: makes something else of such a dict.
        settings: see `OrderSettings` (`batch_size` is a number of tar files here, so leave it) and `AccessSettings`;
            ``on_error="skip"`` leaves out a sample whose transform fails, and the rest of a tar file that is damaged.
    """

    def __init__(
        self,
        listing: BlobListing,
        *,
        credential: Credential = None,
        transform: Callable[[_Sample], _T_co] | None = None,
        **settings: Unpack[_Settings],
    ) -> None:
        order, rest = split_settings(settings)
        self._on_error: OnError = rest.pop("on_error", "raise")
        check_on_error(self._on_error)
        super().__init__(listing, Plan.make(listing, **order))
        self._access = Access(credential, **rest)
        self._transform = transform or cast("Callable[[_Sample], _T_co]", _as_it_is)
        self._skipped = Tally()

    @classmethod
    def from_blob_urls(
        cls,
        blob_urls: str | Iterable[str | os.PathLike[str] | BlobLocation],
        *,
        credential: Credential = None,
        transform: Callable[[_Sample], _T_co] | None = None,
        **settings: Unpack[_Settings],
    ) -> Self:
        """The tar files at these URLs."""
        listing = BlobListing.from_blob_urls(blob_urls)
        return cls(listing, credential=credential, transform=transform, **settings)

    @classmethod
    def from_container_url(
        cls,
        container_url: str | os.PathLike[str] | BlobLocation,
        *,
        prefix: str | None = None,
        glob: str | None = None,
        suffix: str | tuple[str, ...] | None = (".tar", ".tar.gz", ".tgz"),
        credential: Credential = None,
        transform: Callable[[_Sample], _T_co] | None = None,
        **settings: Unpack[_Settings],
    ) -> Self:
        """The tar files in a container, listed now; see `BlobListing.from_container_url`."""
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

    @property
    def skipped(self) -> int:
        """Samples, and rests of tar files, left out so far, in all worker processes together."""
        return int(self._skipped)

    def _read(self, cursor: Cursor) -> Iterator[_T_co]:
        while cursor.position < len(cursor.share):
            blob = Blob(self.listing[cursor.index(cursor.position)], self._access)
            samples = _samples(blob, cursor.offset)
            while True:
                try:
                    offset, sample = next(samples)
                except StopIteration:
                    break
                except Exception as error:
                    self._skip_or_raise(error, blob.url)
                    break
                try:
                    transformed = self._transform(sample)
                except Exception as error:
                    self._skip_or_raise(error, f"{sample['__key__']} in {blob.url}")
                    cursor.offset = offset
                    continue
                cursor.offset = offset
                yield transformed
            cursor.position += 1
            cursor.offset = 0

    def _skip_or_raise(self, error: Exception, what: str) -> None:
        if self._on_error == "raise":
            raise error
        self._skipped.add()
        _log.warning("skipped %s: %s", what, error)


def _samples(blob: Blob, offset: int) -> Iterator[tuple[int, _Sample]]:
    """The samples that begin at `offset` (in the decompressed file) or behind, each with the offset of its end."""
    with blob.reader() as packed:
        compressed = blob.blob_name.endswith((".gz", ".tgz"))
        file = cast("BinaryIO", gzip.GzipFile(fileobj=packed, mode="rb")) if compressed else packed
        file.seek(offset)
        with tarfile.TarFile(fileobj=file, mode="r") as tar:
            sample: _Sample = {}
            end = offset
            while (member := tar.next()) is not None:
                if member.issparse():
                    raise tarfile.ReadError(f"{blob.url}: {member.name} is a sparse file. Pack it without --sparse")
                end = member.offset_data
                if member.isreg():
                    end += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                folder, slash, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not member.isreg() or not stem or not dot:
                    continue
                key = folder + slash + stem
                if sample and sample["__key__"] != key:
                    yield member.offset, sample
                    sample = {}
                content = tar.extractfile(member)
                assert content is not None
                sample = sample or {"__key__": key, "__url__": blob.url}
                sample[extension.lower()] = content.read()
                if len(sample[extension.lower()]) != member.size:
                    raise tarfile.ReadError(f"{blob.url} ends in the middle of {member.name}")
            # tarfile takes a damaged header, unless it is the first one, for the end.
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"{blob.url} is damaged at offset {end}")
            if sample:
                yield end, sample


def _as_it_is(sample: _Sample) -> _Sample:
    return sample

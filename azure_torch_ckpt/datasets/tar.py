"""Samples in tar files, as WebDataset lays them out: `TarDataset`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, TypeVar, cast

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.datasets.archive import begin_in
from azure_torch_ckpt.datasets.listing import BlobListing, ListedBlob
from azure_torch_ckpt.datasets.order import Permutation
from azure_torch_ckpt.datasets.progress import Cursor, Place, Plan, split_settings
from azure_torch_ckpt.datasets.reading import Reading
from azure_torch_ckpt.datasets.records import Record, Sample, members, samples
from azure_torch_ckpt.datasets.shards import shards
from azure_torch_ckpt.datasets.shuffle import shuffled
from azure_torch_ckpt.datasets.sources import TarSettings
from azure_torch_ckpt.datasets.stream import Stream
from azure_torch_ckpt.errors import BlobChangedError, TarShardError

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["TarDataset"]

_T_co = TypeVar("_T_co", covariant=True)


class TarDataset(Stream[Sample, _T_co]):
    """An iterable dataset of the samples in tar files ("shards"), in the layout of WebDataset.

        dataset = TarDataset.from_container_url(
            url, prefix="train-", transform=decode, shuffle=True, shuffle_buffer=1000
        )

    Files that follow each other and whose paths are the same up to the first dot of the name make a sample:
    ``{"__key__": "dir/0001", "__url__": url of the tar file, "jpg": bytes, "cls": bytes}``. With ``group=False``,
    every file is one: ``{"url": url of the tar file, "name": "dir/0001.jpg", "data": bytes}``. Names of shards end in
    ``.tar``, ``.tar.gz`` or ``.tgz``. Ranks and workers share whole shards, so what is said about uneven numbers, and
    ``shuffle``, is about those: have many more than ranks times workers. ``shuffle_buffer`` is about samples.

    Args:
        listing: the tar files.
        credential: see `azure_torch_ckpt.credentials.resolve`; a SAS in a URL wins.
        transform: makes something else of such a dict.
        settings: see `TarSettings`, `OrderSettings` (`batch_size` is a number of shards here, so leave it) and
            `SampleSettings`. ``prefetch_bytes`` is fetched of this and the next shards while the transform runs.
            ``on_error="skip"`` leaves out a sample whose transform fails, and the rest of a shard that cannot be read.
            ``retries`` is how often a transform is tried again, and how often a shard is opened again, behind the last
            sample that was read of it.
    """

    _suffix = (".tar", ".tar.gz", ".tgz")

    def __init__(
        self,
        listing: BlobListing,
        *,
        credential: Credential = None,
        transform: Callable[[Sample], _T_co] | None = None,
        **settings: Unpack[TarSettings],
    ) -> None:
        order, rest = split_settings(settings)
        super().__init__(listing, Plan.make(listing, **order))
        self._records = samples if rest.pop("group", True) else members
        self._buffer: int = rest.pop("shuffle_buffer", 0)
        if self._buffer < 0:
            raise ValueError(f"shuffle_buffer must not be negative, not {self._buffer}")
        self._reading = Reading(credential, **rest)
        self._transform = transform or cast("Callable[[Sample], _T_co]", _as_it_is)

    @property
    def skipped(self) -> int:
        """Samples, and rests of shards, left out so far, in all worker processes together."""
        return self._reading.skipped

    def _read(self, cursor: Cursor) -> Iterator[_T_co]:
        def order(count: int, begin: tuple[int, int]) -> Permutation | range:
            # Where the block begins in the epoch stays the same when a pass is resumed.
            position, offset = cursor.share.position(begin[0]), begin[1]
            seed = self._progress.plan.seed
            return Permutation(count, seed, cursor.epoch, position, offset) if count > 1 else range(1)

        with contextlib.closing(self._in_order(cursor)) as records:
            drawn: Iterator[tuple[Record, Place]] = shuffled(records, max(self._buffer, 1), cursor.place, order)
            for sample, place in drawn:
                try:
                    transformed = self._attempt(sample)
                except Exception as error:
                    self._reading.skip_or_raise(error, _name_of(sample))
                    cursor.place = place
                    continue
                cursor.place = place
                yield transformed

    def _in_order(self, cursor: Cursor) -> Generator[tuple[Record | None, tuple[int, int]], None, None]:
        """The samples from the cursor on, each with the position and offset behind it; None for a rest left out.

        In the place of a sample that cannot be made stands its error, to be raised when its turn has come.
        """
        position, offset = cursor.place[:2]
        failures = 0
        begun: ListedBlob | None = None  # the shard at `position`, as it was when we began to read it
        while position < len(cursor.share):
            blob = self.listing[cursor.index(position)]
            opened = shards(self._blobs(cursor, position, begun), begin_in(blob, offset), self._reading)
            try:
                for shard in opened:
                    for end, sample in self._records(shard, offset):
                        offset, failures, begun = end, 0, shard.blob
                        yield sample, (position, offset)
                    position, offset, failures, begun = position + 1, 0, 0, None
            except Exception as error:
                blob = self.listing[cursor.index(position)]  # that of the error
                changed = isinstance(error, BlobChangedError)
                if changed and not offset and begun is None:
                    # It was replaced since it was listed, and is read as it is now, like blobs of the other datasets.
                    begun = dataclasses.replace(blob, size=None, etag=None)
                elif failures < self._reading.retries and not changed:
                    failures += 1
                else:
                    self._reading.skip_or_raise(error, f"the rest of {blob.location}, from offset {offset} on")
                    position, offset, failures, begun = position + 1, 0, 0, None
                    yield None, (position, 0)
            finally:
                opened.close()

    def _blobs(self, cursor: Cursor, position: int, first: ListedBlob | None) -> Iterator[ListedBlob]:
        if first is not None:
            yield first
            position += 1
        for following in range(position, len(cursor.share)):
            yield self.listing[cursor.index(following)]

    def _attempt(self, sample: Record) -> _T_co:
        if isinstance(sample, TarShardError):
            raise sample
        for _ in range(self._reading.retries):
            with contextlib.suppress(Exception):
                return self._transform(dict(sample))
        return self._transform(dict(sample))


def _as_it_is(sample: Sample) -> Sample:
    return sample


def _name_of(sample: Record) -> str:
    if isinstance(sample, TarShardError):
        return "a sample"
    return "{__key__} in {__url__}".format_map(sample) if "__key__" in sample else "{name} in {url}".format_map(sample)

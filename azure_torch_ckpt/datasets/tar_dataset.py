"""`TarDataset`: samples in tar files, in the layout of WebDataset; and `shuffled`, its shuffle buffer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from azure_torch_ckpt.credentials import Credential
from azure_torch_ckpt.datasets.base import StreamDataset, TarSettings
from azure_torch_ckpt.datasets.blob import BlobFetcher
from azure_torch_ckpt.datasets.epoch_state import Cursor, StreamPosition
from azure_torch_ckpt.datasets.listing import BlobListing, ListedBlob
from azure_torch_ckpt.datasets.order import Permutation, split_settings
from azure_torch_ckpt.datasets.tar_archive import Record, Sample, first_offset, read_members, read_samples
from azure_torch_ckpt.datasets.tar_shards import open_shards
from azure_torch_ckpt.errors import BlobChangedError, TarShardError

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["TarDataset", "shuffled"]

_T_co = TypeVar("_T_co", covariant=True)


class TarDataset(StreamDataset[Sample, _T_co]):
    """An iterable dataset of the samples in tar files ("shards"), in the layout of WebDataset.

        dataset = TarDataset.from_container_url(
            url, prefix="train-", transform=decode, shuffle=True, shuffle_buffer=1000
        )

    Consecutive files whose paths are the same up to the first dot of the name make a sample:
    ``{"__key__": "dir/0001", "__url__": url of the tar file, "jpg": bytes, "cls": bytes}``. With ``group=False``, each
    file is a sample: ``{"url": url of the tar file, "name": "dir/0001.jpg", "data": bytes}``. Names of shards end in
    ``.tar``, ``.tar.gz`` or ``.tgz``. Ranks and workers share whole shards, so ``uneven`` and ``shuffle`` apply to
    shards: use many more of them than ranks times workers. ``shuffle_buffer`` applies to samples.

    Args:
        listing: the tar files.
        credential: see `azure_torch_ckpt.credentials.resolve`; a SAS in a URL takes precedence.
        transform: turns such a dict into something else.
        settings: see `TarSettings`, `OrderSettings` (omit `batch_size`, which counts shards here) and `SampleSettings`.
            ``prefetch_bytes`` of this and the next shards are fetched while the transform runs. ``on_error="skip"``
            skips a sample whose transform fails, and the rest of a shard that cannot be read. ``retries`` is how often
            a transform is called again, and how often a shard is opened again behind the last sample that was read.
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
        super().__init__(listing, **order)
        self._records = read_samples if rest.pop("group", True) else read_members
        self._buffer: int = rest.pop("shuffle_buffer", 0)
        if self._buffer < 0:
            raise ValueError(f"shuffle_buffer must not be negative, not {self._buffer}")
        self._fetcher = BlobFetcher(credential, **rest)
        self._transform = transform or cast("Callable[[Sample], _T_co]", _unchanged)

    def _read(self, cursor: Cursor) -> Iterator[_T_co]:
        def order(count: int, begin: tuple[int, int]) -> Permutation | range:
            # The place of the block in the epoch stays the same when a pass is resumed.
            position, offset = cursor.share.position(begin[0]), begin[1]
            seed = self._epochs.order.seed
            return Permutation(count, seed, cursor.epoch, position, offset) if count > 1 else range(1)

        with contextlib.closing(self._in_order(cursor)) as records:
            drawn: Iterator[tuple[Record, StreamPosition]] = shuffled(
                records, max(self._buffer, 1), cursor.place, order
            )
            for sample, place in drawn:
                try:
                    transformed = self._attempt(sample)
                except Exception as error:
                    self._fetcher.skip_or_raise(error, _name_of(sample))
                    cursor.place = place
                    continue
                cursor.place = place
                yield transformed

    def _in_order(self, cursor: Cursor) -> Generator[tuple[Record | None, tuple[int, int]], None, None]:
        """Yield the samples from the cursor on, each with the position and offset behind it; None for a skipped rest.

        A sample that cannot be made is replaced by its error, which `_read` raises when it is the sample's turn.
        """
        position, offset = cursor.place[:2]
        failures = 0
        begun: ListedBlob | None = None  # the shard at `position`, in the version that is being read
        while position < len(cursor.share):
            blob = self.listing[cursor.index(position)]
            opened = open_shards(self._blobs(cursor, position, begun), first_offset(blob, offset), self._fetcher)
            try:
                for shard in opened:
                    for end, sample in self._records(shard, offset):
                        offset, failures, begun = end, 0, shard.blob
                        yield sample, (position, offset)
                    position, offset, failures, begun = position + 1, 0, 0, None
            except Exception as error:
                blob = self.listing[cursor.index(position)]  # the one that failed
                changed = isinstance(error, BlobChangedError)
                if changed and not offset and begun is None:
                    # The blob was replaced since it was listed. Read the current one, as the other datasets do.
                    begun = dataclasses.replace(blob, size=None, etag=None)
                elif failures < self._fetcher.retries and not changed:
                    failures += 1
                else:
                    self._fetcher.skip_or_raise(error, f"the rest of {blob.location}, from offset {offset} on")
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
        for _ in range(self._fetcher.retries):
            with contextlib.suppress(Exception):
                return self._transform(dict(sample))
        return self._transform(dict(sample))


def _unchanged(sample: Sample) -> Sample:
    return sample


def _name_of(sample: Record) -> str:
    if isinstance(sample, TarShardError):
        return "a sample"
    return "{__key__} in {__url__}".format_map(sample) if "__key__" in sample else "{name} in {url}".format_map(sample)


_T = TypeVar("_T")
_Begin = tuple[int, int]


@dataclass(slots=True)
class _ShuffleBlock(Generic[_T]):
    """Samples that follow each other from `begin` on. No more are added to a `closed` one."""

    begin: _Begin
    samples: list[_T | None] = field(default_factory=list)
    closed: bool = False


def shuffled(
    source: Iterator[tuple[_T | None, _Begin]],
    size: int,
    place: StreamPosition,
    order: Callable[[int, _Begin], Permutation | range],
) -> Iterator[tuple[_T, StreamPosition]]:
    """Shuffle a stream in blocks of `size` samples: for each sample drawn from a block, one is added to the next block.

    So `size` samples are held at any time, the first one is yielded when so many have been read, and none moves by more
    than that. In exchange, a pass is resumed exactly: from the beginning of its block, of which the first few samples
    are drawn already. At most twice `size` samples are read again for that, and the state holds none.

    Args:
        source: samples from `place` on, each with the position and offset behind it; None in place of samples that are
            left out. A None ends a block, so that a block that is read again has the same samples, even if the missing
            ones can be read then.
        place: where to continue.
        order: returns a permutation of a number of samples, for a block that begins at a position.

    Yields:
        samples, each with the place at which to continue after it.
    """
    reached = place[:2]

    def fill(block: _ShuffleBlock[_T], count: int) -> None:
        nonlocal reached
        while len(block.samples) < count and not block.closed:
            item = next(source, None)
            if item is None:
                block.closed = True
                return
            sample, reached = item
            if sample is not None:
                block.samples.append(sample)
            elif block.samples:
                block.closed = True
            else:
                block.begin = reached

    block = _ShuffleBlock[_T](reached)
    drawn = place.drawn
    fill(block, place.block if drawn else size)
    while block.samples:
        following = _ShuffleBlock[_T](reached)
        count = len(block.samples)
        numbers = order(count, block.begin)
        for done in range(drawn + 1, count + 1):
            number = numbers[done - 1]
            sample, block.samples[number] = block.samples[number], None
            assert sample is not None
            yield (
                sample,
                StreamPosition(*block.begin, done, count) if done < count else StreamPosition(*following.begin),
            )
            fill(following, min(done, size))
        block, drawn = following, 0
        fill(block, size)

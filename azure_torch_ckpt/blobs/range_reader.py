"""`RangeReader`: random access to one state of one blob, with few requests however small the reads are.

Three rules keep the number of requests low. A miss fetches more than was requested: the window, which grows while reads
follow each other and shrinks when they jump. Fetched bytes stay within a bound, so that a jump to a table of contents
and back costs one request. A long read goes directly into the caller's memory in parallel ranges, the last of which
includes the window behind it.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from dataclasses import dataclass

from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.download import GAP, Download, Read
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.errors import BlobChangedError
from azure_torch_ckpt.location import BlobLocation

__all__ = ["CACHED", "RangeReader"]

_KIB = 1024
_MIB = 1024 * _KIB
# A request takes some 20 ms, in which a connection moves about half a megabyte.
_START = 256 * _KIB
_SMALLEST = 32 * _KIB
_LARGEST = 32 * _MIB
_GROWTH = 4
# A stream of reads this close to the end gets the rest as well, which saves another request.
_REST = 2 * _MIB
_CACHE = 64 * _MIB
# Readers of zip, Parquet and similar formats begin at the end and go backwards from there.
_TAIL = 128 * _KIB
# Longer reads go into the caller's memory, unless a chunk has their bytes.
CACHED = 1 * _MIB
# A read of everything requests this much first, while the blob's size is unknown.
_FIRST = 4 * _MIB


@dataclass(slots=True)
class _Chunk:
    """Bytes of the blob. `window` is the read-ahead of the stream of reads that fetched them."""

    start: int
    data: memoryview
    window: int

    @property
    def end(self) -> int:
        return self.start + self.data.nbytes


class RangeReader:
    """Reads one blob as it is at one moment. Not thread-safe; the first read sends the first request.

    The first response fixes the state of the blob: later requests carry its ETag.

    Args:
        location: the blob; a snapshot or a version in it is respected.
        if_etag: read only the blob with this ETag.

    Raises (all methods): `BlobNotFoundError`, `BlobChangedError` (the blob was replaced since the first read, or has
        another ETag than `if_etag`), and the errors that `BlobStore` lists.
    """

    def __init__(self, store: BlobStore, location: BlobLocation, if_etag: str | None = None) -> None:
        self._store = store
        self._location = location
        self._etag = if_etag
        self._info: BlobInfo | None = None
        self._capacity = min(_CACHE, store.options.memory_budget)
        self._chunks: OrderedDict[int, _Chunk] = OrderedDict()  # by start, the one used last at the end
        self._starts: list[int] = []
        self._current: _Chunk | None = None
        self._window = _START  # of a stream that begins

    def info(self) -> BlobInfo:
        """Return the blob's properties, by a HEAD request if nothing was read yet."""
        if self._info is None:
            try:
                self._info = self._store.stat(self._location.path, if_etag=self._etag, moment=self._location)
            except BlobChangedError as error:
                raise self._changed() from error
            self._etag = self._info.etag
        return self._info

    def begin(self, offset: int, length: int | None) -> int:
        """Return the blob's size; the first call requests `length` bytes at `offset` (None: all)."""
        if self._info is None:
            limit = _FIRST if length is None else min(max(length, _START), _FIRST)
            try:
                data, self._info = self._store.read_some(
                    self._location.path, offset, limit, if_etag=self._etag, moment=self._location
                )
            except BlobChangedError as error:
                raise self._changed() from error
            self._etag = self._info.etag
            if data:
                self._keep(_Chunk(offset, memoryview(data), _START))
        return self._info.size

    def at(self, offset: int, wanted: int = 1) -> memoryview:
        """Return some bytes from `offset` on, at least one unless the blob ends there. They stay valid.

        Args:
            wanted: the smallest number of bytes if they have to be fetched; `CACHED` at most.
        """
        size = self.begin(offset, wanted)
        if offset >= size:
            return memoryview(b"")
        chunk = self._find(offset)
        if chunk is None:
            self._fetch(offset, min(offset + wanted, size), None)
            chunk = self._find(offset)
            assert chunk is not None
        return chunk.data[offset - chunk.start :]

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill a writable byte view with the bytes from `offset` on; return their number, which is lower at the end."""
        if not view.nbytes:
            return 0
        end = min(offset + view.nbytes, self.begin(offset, view.nbytes))
        position = offset
        while position < end:
            chunk = self._find(position)
            if chunk is not None:
                cached = chunk.data[position - chunk.start : end - chunk.start]
                view[position - offset : position - offset + cached.nbytes] = cached
                position += cached.nbytes
            else:
                position += self._fetch(position, end, view[position - offset : end - offset])
        return max(0, position - offset)

    def drop(self) -> None:
        """Drop the cached bytes."""
        self._chunks.clear()
        self._starts.clear()
        self._current = None

    def _find(self, offset: int) -> _Chunk | None:
        chunk = self._current
        if chunk is not None and chunk.start <= offset < chunk.end:
            return chunk
        chunk = self._before(offset)
        if chunk is None or offset >= chunk.end:
            return None
        self._chunks.move_to_end(chunk.start)
        self._current = chunk
        return chunk

    def _before(self, offset: int) -> _Chunk | None:
        """Return the last chunk that starts at `offset` or before."""
        index = bisect.bisect_right(self._starts, offset)
        return self._chunks[self._starts[index - 1]] if index else None

    def _fetch(self, offset: int, end: int, dest: memoryview | None) -> int:
        """Fetch the bytes at `offset`, which no chunk has. The read needs the bytes up to `end`, in `dest`.

        Returns:
            the number of bytes in `dest`: all up to the next chunk, or none if a new chunk has them.
        """
        size = self.info().size
        before = self._before(offset)
        after = bisect.bisect_right(self._starts, offset)
        limit = self._starts[after] if after < len(self._starts) else size
        wanted = min(end, limit) - offset
        window, smallest_rest = self._window_at(offset, before)
        if dest is not None and wanted >= max(CACHED, window):
            ahead = memoryview(bytearray(min(window, limit - offset - wanted)))
            self._request(offset, [dest[:wanted], ahead])
            if ahead.nbytes:
                self._keep(_Chunk(offset + wanted, ahead, window))
            return wanted
        start, stop = offset, min(limit, offset + max(wanted, window))
        if limit - stop < smallest_rest:
            stop = limit
        if size - start <= _TAIL and limit == size:
            start = max(size - _TAIL, before.end if before else 0)
        data = memoryview(bytearray(stop - start))
        self._request(start, [data])
        self._keep(_Chunk(start, data, window))
        return 0

    def _window_at(self, offset: int, before: _Chunk | None) -> tuple[int, int]:
        """Return the read-ahead, and the smallest rest that is worth a request of its own."""
        if before is not None and offset - before.end <= GAP:
            self._window = min(2 * self._window, _START)
            largest = min(_LARGEST, self._capacity // 2)
            if before.window < _START:  # two neighbouring reads among many jumps are not a stream
                return min(2 * before.window, largest), _SMALLEST
            window = min(_GROWTH * before.window, largest)
            return window, min(2 * window, _REST, largest)
        window, self._window = self._window, max(self._window // 2, _SMALLEST)
        return window, _SMALLEST

    def _request(self, offset: int, views: list[memoryview]) -> None:
        views = [view for view in views if view.nbytes]
        total = sum(view.nbytes for view in views)
        path = self._location.path
        try:
            if total <= self._store.options.part_size(total):
                self._store.read_into(path, offset, views, if_etag=self._etag, moment=self._location)
                return
            reads = []
            for view in views:
                reads.append(Read(path, offset, view.nbytes, view))
                offset += view.nbytes
            Download(self._store, total, if_etag=self._etag, moment=self._location).run(reads)
        except BlobChangedError as error:
            raise self._changed() from error

    def _changed(self) -> BlobChangedError:
        if self._info is None:
            return BlobChangedError(f"{self._location} has another ETag than if_etag={self._etag}: it was replaced")
        return BlobChangedError(
            f"{self._location} was replaced or removed while it was read. The bytes read before are of the old blob; "
            "open it again"
        )

    def _keep(self, chunk: _Chunk) -> None:
        self._chunks[chunk.start] = self._current = chunk
        bisect.insort(self._starts, chunk.start)
        held = sum(kept.data.nbytes for kept in self._chunks.values())
        while held > self._capacity and len(self._chunks) > 1:
            _, dropped = self._chunks.popitem(last=False)
            self._starts.remove(dropped.start)
            held -= dropped.data.nbytes

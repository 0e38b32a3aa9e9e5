"""`Download`: ranges of any number of blobs are received into views by bounded workers."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from azure_torch_ckpt._internal.checksums import combine, crc64
from azure_torch_ckpt._internal.gc_pause import CollectorPause
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.errors import BlobChangedError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["GAP", "Check", "Download", "Read"]

# Unrequested bytes that are fetched to save a request: at tens of MB/s a connection and some 20 ms a request, 128 KiB
# cost less than the request.
GAP = 128 * 1024
# Shorter ranges are received together and copied: receiving each separately would cost more.
_COPY_BELOW = 32 * 1024


class Check:
    """Compares the checksum of an item that is read completely, in any number of parts and by any number of threads.

    Args:
        expected: CRC64-NVME of the item's `length` bytes.
        mismatch: called with another CRC64 that the bytes have, by the worker that received the last part.
    """

    __slots__ = ("_expected", "_left", "_lock", "_mismatch", "_parts")

    def __init__(self, expected: int, length: int, mismatch: Callable[[int], None]) -> None:
        self._expected = expected
        self._left = length
        self._mismatch = mismatch
        self._parts: list[tuple[int, int, int]] = []
        self._lock = threading.Lock()

    def add(self, offset: int, *views: memoryview) -> None:
        """Add the bytes in `views`, which start at `offset`; the last call compares the checksums."""
        crc = length = 0
        for view in views:
            crc = crc64(view, crc)
            length += view.nbytes
        with self._lock:
            self._left -= length
            if self._parts or self._left > 0:
                self._parts.append((offset, crc, length))
            if self._left > 0:
                return
        if self._parts:
            crc = 0
            for _, part_crc, part_length in sorted(self._parts):
                crc = combine(crc, part_crc, part_length)
        if crc != self._expected:
            self._mismatch(crc)


@dataclass(slots=True)
class Read:
    """A range of one blob to be read, and its destination.

    Attributes:
        offset: of the first byte in the blob.
        length: bytes.
        dest: writable bytes for the range, or for its bytes from `skip` on; None for a buffer that lives as long as
            `use` runs.
        use: called by a worker with the received bytes.
        check: the item's checksum, if the whole item is read.
        skip: bytes before those for `dest`. They, and those behind, are only for the check.
    """

    path: str
    offset: int
    length: int
    dest: memoryview | None = None
    use: Callable[[memoryview], None] | None = None
    check: Check | None = None
    skip: int = 0


class Download:
    """Ranges of any number of blobs, received in parallel.

    Neighbouring ranges of a blob share a request. Ranges with a `Read.dest` may have any length and are split; the
    others must not be longer than `part_size`, which bounds the memory.

    Args:
        total: the expected number of bytes, which determines the size of the requests.
        if_etag, moment: as for `BlobStore`.
        moved: called by a worker with the number of bytes of each answered request, without unrequested bytes.
    """

    def __init__(
        self,
        store: BlobStore,
        total: int,
        *,
        if_etag: str | None = None,
        moment: BlobLocation | None = None,
        moved: Callable[[int], None] | None = None,
    ) -> None:
        self._store = store
        self._if_etag = if_etag
        self._moment = moment
        self._moved = moved
        self.part_size = store.options.part_size(total)
        self._etags: dict[str, str] = {}
        # Scratch memory of finished requests. New memory from the system costs a page fault per 4 KiB.
        self._free: list[bytearray] = []

    def run(self, reads: Iterable[Read]) -> None:
        """Fetch everything.

        Raises:
            BlobNotFoundError: a blob is missing.
            BlobChangedError: a blob was replaced between two requests, or has another ETag than `if_etag`.
            RequestRefusedError: a blob is shorter than a range (``status`` is 416).
            StoreError: for other reasons; and the errors of a `Check` or a `Read.use`.
        """
        cancel = Cancel()
        run_all(
            (functools.partial(self._fetch, request, cancel) for request in self._requests(reads)),
            self._store.options.concurrency,
            "blob-download",
            cancel.cancel,
        )

    def _requests(self, reads: Iterable[Read]) -> list[list[Read]]:
        """Return the ranges of each request, in the order of their offsets."""
        parts: list[Read] = []
        for read in reads:
            if 0 < read.length <= self.part_size:
                parts.append(read)
            else:
                parts += self._split(read)
        requests: list[list[Read]] = []
        path, start, end = "", 0, 0
        most = self.part_size + GAP  # an item's envelope should not need a request of its own
        with CollectorPause():
            parts.sort(key=operator.attrgetter("path", "offset"))
            for part in parts:
                offset = part.offset
                part_end = offset + part.length
                if requests and part.path == path and end <= offset <= end + GAP and part_end - start <= most:
                    requests[-1].append(part)
                else:
                    requests.append([part])
                    path, start = part.path, offset
                end = part_end
        return requests

    def _split(self, read: Read) -> Sequence[Read]:
        if read.length == 0:
            return []
        if read.dest is None:
            return [read]
        first, behind = read.offset + read.skip, read.offset + read.skip + read.dest.nbytes
        parts = []
        for offset, length in ((read.offset, read.skip), (behind, read.offset + read.length - behind)):
            if length:
                parts.append(Read(read.path, offset, length, None, None, read.check))
        size = max(-(-read.dest.nbytes // -(-read.dest.nbytes // self.part_size)), 1)  # as even as possible
        for start in range(0, read.dest.nbytes, size):
            dest = read.dest[start : start + size]
            parts.append(Read(read.path, first + start, dest.nbytes, dest, read.use, read.check))
        return parts

    def _fetch(self, request: list[Read], cancel: Cancel) -> None:
        path, end = request[0].path, request[0].offset
        used = 0  # bytes of scratch memory: gaps, envelopes and small ranges
        placed: list[tuple[Read, int]] = []
        direct: list[tuple[int, memoryview]] = []  # destinations, each with the number of scratch bytes before it
        with CollectorPause():
            for read in request:
                used += read.offset - end
                placed.append((read, used))
                dest, length = read.dest, read.length
                if dest is None or length < _COPY_BELOW:
                    used += length
                else:
                    direct.append((used + read.skip, dest))
                    used += length - dest.nbytes
                end = read.offset + length
        kept = self._scratch(used)
        scratch = memoryview(kept)
        views: list[memoryview] = []
        before = 0
        for position, dest in direct:
            if position > before:
                views.append(scratch[before:position])
                before = position
            views.append(dest)
        if used > before:
            views.append(scratch[before:used])
        etag = self._store.read_into(
            path, request[0].offset, views, if_etag=self._if_etag, moment=self._moment, cancel=cancel
        )
        if self._etags.setdefault(path, etag) != etag:
            raise BlobChangedError(f"{self._store.location}/{path} was replaced while it was read; try again")
        for read, position in placed:
            _deliver(read, scratch, position)
        if not any(read.dest is None for read in request):
            self._free.append(kept)
        if self._moved is not None:
            self._moved(sum(read.length for read in request))

    def _scratch(self, size: int) -> bytearray:
        try:
            kept = self._free.pop()
        except IndexError:
            return bytearray(size)
        return kept if len(kept) >= size else bytearray(size)


def _deliver(read: Read, scratch: memoryview, position: int) -> None:
    """Copy a range to its destination, unless it was received there. Its other bytes are in `scratch` at `position`."""
    dest, length = read.dest, read.length
    if dest is None or length < _COPY_BELOW:
        received = scratch[position : position + length]
        if read.check is not None:
            read.check.add(read.offset, received)
        if dest is None:
            dest = received
        else:
            dest[:] = received[read.skip : read.skip + dest.nbytes]
    elif read.check is not None:
        inside = position + read.skip
        behind = position + length - dest.nbytes
        read.check.add(read.offset, scratch[position:inside], dest, scratch[inside:behind])
    if read.use is not None:
        read.use(dest)

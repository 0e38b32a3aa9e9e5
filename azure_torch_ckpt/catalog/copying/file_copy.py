"""The copy of one blob or file, as tasks for any threads, in three rounds: is it there, move it, read it back."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from azure_torch_ckpt._internal.checksums import combine, crc64, md5
from azure_torch_ckpt.blobs.blob_copy import MARK, SERVICE_PART, BlobSink, ServiceFetch
from azure_torch_ckpt.blobs.settings import METADATA_LIMIT, CopiedSettings
from azure_torch_ckpt.blobs.store import BlobInfo
from azure_torch_ckpt.blobs.transfer import Check
from azure_torch_ckpt.catalog.copying.folders import BlobEnd, End, FolderEnd
from azure_torch_ckpt.catalog.copying.plan import FilePlan
from azure_torch_ckpt.dcp.metadata.schema import StoredItem
from azure_torch_ckpt.errors import AccessDeniedError, BlobChangedError, CorruptCheckpointError
from azure_torch_ckpt.options import MAX_BLOCKS
from azure_torch_ckpt.progress import Meter
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["CopyRun", "FileCopy"]

Task = Callable[[], None]


@dataclass(slots=True)
class CopyRun:
    """What all files of a copy share.

    Attributes:
        part_size: bytes that go through this machine in one piece.
        verify: whether checksums are compared where that takes reading.
        service: fetches the data by itself, if both ends are containers. It may turn out that it cannot.
        meter: counts the bytes that have arrived or were there.
    """

    source: End
    target: End
    part_size: int
    verify: bool
    service: ServiceFetch | None
    meter: Meter
    cancel: Cancel = field(default_factory=Cancel)


class FileCopy:
    """One file. When a round's tasks have ended, the method that settles the round comes."""

    def __init__(self, plan: FilePlan, run: CopyRun) -> None:
        self.plan = plan
        self.skipped = False
        self._run = run
        self._lock = threading.Lock()
        self._sink = run.target.sink(plan.source.path)
        self._checks = _ItemChecks(plan.items)
        self._crcs: dict[int, tuple[int, int]] = {}  # CRC64 and length of the parts whose CRC64 is known, by offset
        self._known = 0  # bytes of those parts
        self._seen = 0  # bytes that went through `_checks`
        self._left = 0

    @property
    def size(self) -> int:
        return self.plan.source.size

    # Round 1: is it there already?

    def checks(self) -> Iterator[Task]:
        """A copy that was broken off left whole files: blobs with a mark, and files with their source's time."""
        run, there = self._run, self.plan.there
        if there is None or there.size != self.size:
            return
        if isinstance(run.target, FolderEnd):
            if run.verify and self.plan.crc64 is not None:
                yield from self._each_part(self._part_size, functools.partial(self._look, run.target, there))
            else:
                age = there.last_modified - self.plan.source.last_modified
                self.skipped = abs(age.total_seconds()) < 1
        elif isinstance(run.source, BlobEnd) or self.plan.crc64 is not None:
            self.skipped = run.target.mark_of(there) == self._mark()
        elif run.target.mark_of(there) is not None:
            yield from self._each_part(self._part_size, functools.partial(self._look, run.source, self.plan.source))

    def settle_checks(self) -> None:
        there = self.plan.there
        if there is not None and self._known == self.size and self.size:
            if isinstance(self._run.target, FolderEnd):
                self.skipped = self._crc64() == self.plan.crc64
            else:
                self.skipped = self._run.target.mark_of(there) == self._mark()
        self._forget()
        if self.skipped:
            self._run.meter.moved(self.size)

    # Round 2: move it

    def moves(self) -> Iterator[Task]:
        """The last of these tasks to end makes the file visible."""
        service = self._run.service
        part_size = self._part_size if service is None or not service.possible else max(self._part_size, SERVICE_PART)
        tasks = list(self._each_part(part_size, self._move)) or [functools.partial(self._move, 0, 0)]
        self._left = len(tasks)
        yield from tasks

    def abandon(self) -> None:
        """After the tasks have ended, whether they raised or not: leave nothing half done behind."""
        self._sink.abandon()

    # Round 3: compare what the service has fetched

    def read_backs(self) -> Iterator[Task]:
        """Nothing to do where the bytes went through here, or where the service told their checksum."""
        verified = self._seen == self.size or (self._known == self.size and self._crc64() == self.plan.crc64)
        if self.skipped or verified or not self._run.verify or self._checks.count == 0:
            return
        self._forget()
        made = BlobInfo(self.plan.source.path, self.size, "", self.plan.source.last_modified)
        yield from self._each_part(self._part_size, functools.partial(self._read_back, made))

    def settle_read_backs(self) -> None:
        """Raises `CorruptCheckpointError` if the copy is damaged."""
        self._raise_if_damaged()

    # The work

    @property
    def _part_size(self) -> int:
        return max(self._run.part_size, -(-self.size // MAX_BLOCKS))

    def _each_part(self, part_size: int, task: Callable[[int, int], None]) -> Iterator[Task]:
        for offset in range(0, self.size, part_size):
            yield functools.partial(task, offset, min(part_size, self.size - offset))

    def _look(self, end: End, info: BlobInfo, offset: int, length: int) -> None:
        part = memoryview(bytearray(length))
        end.read(info, offset, part, self._run.cancel)
        self._note(offset, part)

    def _read_back(self, made: BlobInfo, offset: int, length: int) -> None:
        try:
            self._look(self._run.target, made, offset, length)
        except AccessDeniedError as error:
            raise AccessDeniedError(
                f"The service has copied {made.path} and told no checksum, and {self._run.target.where} may not be "
                "read to compare it. Use a credential that may, or pass verify=False. No checkpoint is visible there "
                "yet"
            ) from error

    def _move(self, offset: int, length: int) -> None:
        if not self._fetched_by_the_service(offset, length):
            for start in range(offset, offset + length, self._part_size):
                self._move_through_here(start, min(self._part_size, offset + length - start))
        self._run.meter.moved(length)
        with self._lock:
            self._left -= 1
            if self._left:
                return
        self._raise_if_damaged()
        self._sink.commit(self.plan.source, self._settings())

    def _move_through_here(self, offset: int, length: int) -> None:
        part = memoryview(bytearray(length))
        self._run.source.read(self.plan.source, offset, part, self._run.cancel)
        self._sink.write(offset, part, self._note(offset, part), self._run.cancel)
        stored = self.plan.source.md5
        if stored is not None and length == self.size and md5(bytes(part)) != stored:
            raise CorruptCheckpointError(
                f"{self.plan.source.path} of {self._run.source.where} does not have the MD5 that was stored with it. "
                "It was damaged in storage or on the way; copy again to rule out the way"
            )

    def _fetched_by_the_service(self, offset: int, length: int) -> bool:
        run, source = self._run, self.plan.source
        if run.service is None or not run.service.possible:
            return False
        assert isinstance(run.source, BlobEnd) and isinstance(self._sink, BlobSink)
        there = dataclasses.replace(source, path=run.source.path(source.path))
        try:
            settings = self._settings() if length == self.size else None
            fetched = run.service.try_to(self._sink, there, offset, length, settings, run.cancel)
        except BlobChangedError as error:
            raise run.source.changed() from error
        if fetched is None:
            return False
        if fetched.crc64 is None and run.verify and not run.target.may_look:
            run.service.possible = False  # nothing could compare what it copies
            return False
        if fetched.crc64 is not None:
            with self._lock:
                self._crcs[offset] = fetched.crc64, length
                self._known += length
        return True

    def _note(self, offset: int, part: memoryview) -> int:
        """Take in bytes that are here; return their CRC64."""
        self._checks.add(offset, part)
        crc = crc64(part)
        with self._lock:
            self._crcs[offset] = crc, part.nbytes
            self._known += part.nbytes
            self._seen += part.nbytes
        return crc

    def _forget(self) -> None:
        self._checks, self._crcs, self._known, self._seen = _ItemChecks(self.plan.items), {}, 0, 0

    def _crc64(self) -> int:
        """Of the whole file, once all parts are known."""
        crc = 0
        for _, (part, length) in sorted(self._crcs.items()):
            crc = combine(crc, part, length)
        return crc

    def _mark(self) -> str:
        """What the target's blob is marked with: which blob it is a copy of, or the checksum of which file."""
        if isinstance(self._run.source, BlobEnd):
            return f"etag {self.plan.source.etag.strip(chr(34))}"
        crc = self.plan.crc64
        return f"crc64 {self._crc64() if crc is None else crc:016x}"

    def _settings(self) -> CopiedSettings:
        """What the target's blob carries beside its bytes: what the source's does, and the mark."""
        run, source = self._run, self.plan.source
        if not isinstance(run.target, BlobEnd):
            return CopiedSettings()
        carried = run.source.settings_of(source)
        marked = {**carried.metadata, MARK: self._mark()}
        if sum(len(name) + len(value) for name, value in marked.items()) > METADATA_LIMIT:
            return carried  # a copy that is broken off would not know this blob again
        return dataclasses.replace(carried, metadata=marked)

    def _raise_if_damaged(self) -> None:
        if self._checks.damaged:
            item = self._checks.damaged[0]
            raise CorruptCheckpointError(
                f"The {item.length} bytes at offset {item.offset} of {self.plan.source.path}, copied from "
                f"{self._run.source.where} to {self._run.target.where}, do not have the CRC64 {item.crc64:016x} that "
                "was saved. They were damaged in storage or on the way: verify() tells what is wrong with the source"
            )


class _ItemChecks:
    """Compares the CRC64 of the items of a file whose bytes come in parts, in any order."""

    def __init__(self, items: list[StoredItem]) -> None:
        self.damaged: list[StoredItem] = []
        self._items = [item for item in items if item.crc64 is not None and item.length]
        self._starts = [item.offset for item in self._items]
        self._checks = [self._check(item) for item in self._items]
        # Items do not overlap, unless somebody meant them to.
        self._longest = max((item.length for item in self._items), default=0)

    @property
    def count(self) -> int:
        return len(self._items)

    def add(self, offset: int, part: memoryview) -> None:
        end = offset + part.nbytes
        first = bisect.bisect_right(self._starts, offset - self._longest)
        for index in range(first, bisect.bisect_left(self._starts, end)):
            item = self._items[index]
            start, stop = max(item.offset, offset), min(item.offset + item.length, end)
            if start < stop:
                self._checks[index].add(start, part[start - offset : stop - offset])

    def _check(self, item: StoredItem) -> Check:
        assert item.crc64 is not None
        return Check(item.crc64, item.length, lambda _: self.damaged.append(item))

"""`FileCopy`: copies one blob or file in three rounds of tasks for any threads: compare, move, read back."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from azure_torch_ckpt._internal.checksums import combine, crc64, md5
from azure_torch_ckpt.blobs.blob_copy import MARK, SERVICE_PART, BlobDestination, ServiceFetch
from azure_torch_ckpt.blobs.blob_info import METADATA_LIMIT, BlobInfo, CopiedSettings
from azure_torch_ckpt.blobs.download import Check
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.catalog.copying.plan import FilePlan
from azure_torch_ckpt.catalog.copying.trees import BlobTree, FolderTree, Tree
from azure_torch_ckpt.dcp.metadata.schema import StoredItem
from azure_torch_ckpt.errors import AccessDeniedError, BlobChangedError, CorruptCheckpointError
from azure_torch_ckpt.options import MAX_BLOCKS, TransferOptions
from azure_torch_ckpt.progress import Meter
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["CopyRun", "FileCopy"]

Task = Callable[[], None]


@dataclass(slots=True)
class CopyRun:
    """The state that all files of a copy share.

    Attributes:
        part_size: bytes of one range that goes through this machine.
        verify: whether to compare checksums where that takes reading the copy.
        service: copies data within the service, if source and destination are containers. It may turn out to be unable.
        meter: counts the bytes that have arrived or were there already.
    """

    source: Tree
    destination: Tree
    options: TransferOptions
    part_size: int
    verify: bool
    service: ServiceFetch | None
    meter: Meter
    cancel: Cancel = field(default_factory=Cancel)

    def run_tasks(self, tasks: Iterable[Task]) -> None:
        """Run tasks on as many threads as the copy has connections. The first error ends them and is raised."""
        run_all(tasks, self.options.concurrency, "blob-copy", self.cancel.cancel)


class FileCopy:
    """The copy of one file.

    Each round has a method that returns its tasks and, except for the second one, a method to call after the tasks.
    """

    def __init__(self, plan: FilePlan, run: CopyRun) -> None:
        self.plan = plan
        self.skipped = False
        self._run = run
        self._lock = threading.Lock()
        self._file = run.destination.create(plan.source.path)
        self._checks = _ItemChecks(plan.items)
        self._crcs: dict[int, tuple[int, int]] = {}  # CRC64 and length of the ranges whose CRC64 is known, by offset
        self._bytes_with_crc = 0
        self._bytes_checked = 0  # by `_checks`
        self._moves_left = 0

    @property
    def size(self) -> int:
        return self.plan.source.size

    # Round 1: does the destination have the copy already?

    def comparisons(self) -> Iterator[Task]:
        """An interrupted copy left complete files: blobs with a mark, and files with the time of their source."""
        run, existing = self._run, self.plan.existing
        if existing is None or existing.size != self.size:
            return
        if isinstance(run.destination, FolderTree):
            if run.verify and self.plan.crc64 is not None:
                yield from self._each_part(self._part_size, functools.partial(self._read, run.destination, existing))
            else:
                age = existing.last_modified - self.plan.source.last_modified
                self.skipped = abs(age.total_seconds()) < 1
        elif isinstance(run.source, BlobTree) or self.plan.crc64 is not None:
            self.skipped = run.destination.copy_mark(existing) == self._mark()
        elif run.destination.copy_mark(existing) is not None:
            yield from self._each_part(self._part_size, functools.partial(self._read, run.source, self.plan.source))

    def after_comparisons(self) -> None:
        """Decide whether this file is skipped."""
        existing = self.plan.existing
        if existing is not None and self._bytes_with_crc == self.size and self.size:
            if isinstance(self._run.destination, FolderTree):
                self.skipped = self._crc64() == self.plan.crc64
            else:
                self.skipped = self._run.destination.copy_mark(existing) == self._mark()
        self._reset()
        if self.skipped:
            self._run.meter.moved(self.size)

    # Round 2: move the bytes

    def moves(self) -> Iterator[Task]:
        """Return the tasks of the second round. The last one to end makes the file visible."""
        service = self._run.service
        part_size = self._part_size if service is None or not service.possible else max(self._part_size, SERVICE_PART)
        tasks = list(self._each_part(part_size, self._move)) or [functools.partial(self._move, 0, 0)]
        self._moves_left = len(tasks)
        yield from tasks

    def abandon(self) -> None:
        """Remove an incomplete copy. Call it after the tasks have ended, whether they raised or not."""
        self._file.abandon()

    # Round 3: verify what the service copied

    def read_backs(self) -> Iterator[Task]:
        """Return no tasks where the bytes went through this machine, or where the service returned their checksum."""
        verified = self._bytes_checked == self.size or (
            self._bytes_with_crc == self.size and self._crc64() == self.plan.crc64
        )
        if self.skipped or verified or not self._run.verify or not self._checks.items:
            return
        self._reset()
        copied = BlobInfo(self.plan.source.path, self.size, "", self.plan.source.last_modified)
        yield from self._each_part(self._part_size, functools.partial(self._read_back, copied))

    # The tasks

    @property
    def _part_size(self) -> int:
        return max(self._run.part_size, -(-self.size // MAX_BLOCKS))

    def _each_part(self, part_size: int, task: Callable[[int, int], None]) -> Iterator[Task]:
        for offset in range(0, self.size, part_size):
            yield functools.partial(task, offset, min(part_size, self.size - offset))

    def _read(self, tree: Tree, info: BlobInfo, offset: int, length: int) -> None:
        part = memoryview(bytearray(length))
        tree.read_into(info, offset, part, self._run.cancel)
        self._check(offset, part)

    def _read_back(self, copied: BlobInfo, offset: int, length: int) -> None:
        try:
            self._read(self._run.destination, copied, offset, length)
        except AccessDeniedError as error:
            raise AccessDeniedError(
                f"The service copied {copied.path} and returned no checksum, and the credential may not read "
                f"{self._run.destination} to compare the data. Use a credential that may, or pass verify=False. No "
                "checkpoint is visible there yet"
            ) from error

    def _move(self, offset: int, length: int) -> None:
        if not self._move_within_service(offset, length):
            for start in range(offset, offset + length, self._part_size):
                self._move_through_here(start, min(self._part_size, offset + length - start))
        self._run.meter.moved(length)
        with self._lock:
            self._moves_left -= 1
            if self._moves_left:
                return
        self.raise_if_damaged()
        self._file.commit(self.plan.source, self._settings())

    def _move_through_here(self, offset: int, length: int) -> None:
        part = memoryview(bytearray(length))
        self._run.source.read_into(self.plan.source, offset, part, self._run.cancel)
        self._file.write(offset, part, self._check(offset, part), self._run.cancel)
        stored = self.plan.source.md5
        if stored is not None and length == self.size and md5(bytes(part)) != stored:
            raise CorruptCheckpointError(
                f"{self.plan.source.path} of {self._run.source} does not have the MD5 that was stored with it. It was "
                "damaged in storage or in transit; copy again to rule out the transit"
            )

    def _move_within_service(self, offset: int, length: int) -> bool:
        """Let the service copy a range; return False if it cannot."""
        run, source = self._run, self.plan.source
        if run.service is None or not run.service.possible:
            return False
        assert isinstance(run.source, BlobTree) and isinstance(self._file, BlobDestination)
        blob = dataclasses.replace(source, path=run.source.path(source.path))
        try:
            settings = self._settings() if length == self.size else None
            fetched = run.service.try_to(self._file, blob, offset, length, settings, run.cancel)
        except BlobChangedError as error:
            raise run.source.replaced_error() from error
        if fetched is None:
            return False
        if fetched.crc64 is None and run.verify and not run.destination.readable:
            run.service.possible = False  # its copies could not be verified
            return False
        if fetched.crc64 is not None:
            with self._lock:
                self._crcs[offset] = fetched.crc64, length
                self._bytes_with_crc += length
        return True

    def _check(self, offset: int, part: memoryview) -> int:
        """Compare the items in a range with their checksums; return the CRC64 of the range."""
        self._checks.add(offset, part)
        crc = crc64(part)
        with self._lock:
            self._crcs[offset] = crc, part.nbytes
            self._bytes_with_crc += part.nbytes
            self._bytes_checked += part.nbytes
        return crc

    def _reset(self) -> None:
        self._checks, self._crcs, self._bytes_with_crc, self._bytes_checked = _ItemChecks(self.plan.items), {}, 0, 0

    def _crc64(self) -> int:
        """Return the CRC64 of the whole file, once that of all ranges is known."""
        crc = 0
        for _, (part, length) in sorted(self._crcs.items()):
            crc = combine(crc, part, length)
        return crc

    def _mark(self) -> str:
        """Return the mark for the destination's blob: the ETag of the source's blob, or the checksum of its file."""
        if isinstance(self._run.source, BlobTree):
            return f"etag {self.plan.source.etag.strip(chr(34))}"
        crc = self.plan.crc64
        return f"crc64 {self._crc64() if crc is None else crc:016x}"

    def _settings(self) -> CopiedSettings:
        """Return the settings for the destination's blob: those of the source's blob, and the mark."""
        if not isinstance(self._run.destination, BlobTree):
            return CopiedSettings()
        settings = self._run.source.settings(self.plan.source)
        marked = {**settings.metadata, MARK: self._mark()}
        if sum(len(name) + len(value) for name, value in marked.items()) > METADATA_LIMIT:
            return settings  # without a mark, the next copy copies this blob again
        return dataclasses.replace(settings, metadata=marked)

    def raise_if_damaged(self) -> None:
        """Raise `CorruptCheckpointError` if an item of the copy is damaged. It ends the third round."""
        if self._checks.damaged:
            item = self._checks.damaged[0]
            raise CorruptCheckpointError(
                f"The {item.length} bytes at offset {item.offset} of {self.plan.source.path}, copied from "
                f"{self._run.source} to {self._run.destination}, do not have the CRC64 {item.crc64:016x} that was "
                "saved. They were damaged in storage or in transit: verify() checks the source"
            )


class _ItemChecks:
    """Compares the CRC64 of the items of a file whose bytes come as ranges, in any order."""

    def __init__(self, items: list[StoredItem]) -> None:
        self.damaged: list[StoredItem] = []
        self.items = [item for item in items if item.crc64 is not None and item.length]
        self._starts = [item.offset for item in self.items]
        self._checks = [self._item_check(item) for item in self.items]
        # Items do not overlap, unless the metadata was forged.
        self._longest = max((item.length for item in self.items), default=0)

    def add(self, offset: int, part: memoryview) -> None:
        end = offset + part.nbytes
        first = bisect.bisect_right(self._starts, offset - self._longest)
        for index in range(first, bisect.bisect_left(self._starts, end)):
            item = self.items[index]
            start, stop = max(item.offset, offset), min(item.offset + item.length, end)
            if start < stop:
                self._checks[index].add(start, part[start - offset : stop - offset])

    def _item_check(self, item: StoredItem) -> Check:
        assert item.crc64 is not None
        return Check(item.crc64, item.length, lambda _: self.damaged.append(item))

"""`verify`: is every byte that a checkpoint's metadata describes in the container, and undamaged?"""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch.distributed.checkpoint.metadata import Metadata

from azure_torch_ckpt.blobs.download import Check, Download, Read
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.dcp.item_reader import crc64_mismatch, item_name
from azure_torch_ckpt.dcp.metadata.schema import StoredItem, stored_item
from azure_torch_ckpt.dcp.open_checkpoint import open_checkpoint
from azure_torch_ckpt.dcp.report import job_rank
from azure_torch_ckpt.errors import AccessDeniedError, BlobNotFoundError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.progress import Meter, Progress, ProgressOption, check_progress
from azure_torch_ckpt.transport.buffers import Cancel

__all__ = ["BlobReport", "VerifyReport", "verify", "verify_items"]


@dataclass(slots=True)
class BlobReport:
    """The result for one data blob.

    Attributes:
        name: below the checkpoint's URL.
        size: its bytes; None if it is missing.
        expected_size: bytes that it must have at least.
        items: how many items the metadata places in it.
        checked: items whose bytes were read and compared.
        without_checksum: items that cannot be compared, because their writer stored no CRC64.
        problems: one sentence each, naming the tensor or object.
    """

    name: str
    size: int | None
    expected_size: int
    items: int
    checked: int = 0
    without_checksum: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of `verify`: `ok`, and the blobs in the order of their names."""

    url: str
    blobs: list[BlobReport]

    @property
    def ok(self) -> bool:
        return not any(blob.problems for blob in self.blobs)

    @property
    def problems(self) -> list[str]:
        return [problem for blob in self.blobs for problem in blob.problems]


def verify(
    url: str | os.PathLike[str] | BlobLocation,
    *,
    credential: Credential = None,
    sample: float = 1.0,
    progress: ProgressOption = None,
    options: TransferOptions | None = None,
    ca_file: str | None = None,
) -> VerifyReport:
    """Read a checkpoint and compare every size and CRC64 with its metadata. Changes nothing.

    The sizes come from a listing, or where the credential does not allow one from a request for each blob.

    Args:
        url: of the checkpoint.
        sample: share of the items that are read, 0 to 1, chosen at random. The sizes of all blobs are checked anyway.
        progress: as for `AzureBlobReader`; counts the bytes read.

    Raises:
        CheckpointNotFoundError: there is no complete checkpoint.
        UnsafeMetadataError, CorruptCheckpointError, UnsupportedCheckpointError: its metadata cannot be read.
        StoreError: the service could not be asked.
    """
    if not 0 <= sample <= 1:
        raise ValueError(f"sample is a share between 0 and 1, not {sample}")
    check_progress(progress)
    checkpoint = open_checkpoint(url, Access(credential, options, ca_file))
    return verify_items(checkpoint.store, checkpoint.location, checkpoint.metadata, sample, progress)


def verify_items(
    store: BlobStore, location: BlobLocation, metadata: Metadata, sample: float, progress: ProgressOption
) -> VerifyReport:
    """`verify` with metadata that was read already."""
    by_blob: dict[str, list[tuple[str, StoredItem]]] = {}
    for index, info in metadata.storage_data.items():
        item = stored_item(info)
        by_blob.setdefault(item.relative_path, []).append((item_name(index), item))
    reports = _sizes(store, location, by_blob)
    chosen = [
        (reports[path], name, item)
        for path, items in by_blob.items()
        for name, item in items
        if not reports[path].problems and (sample >= 1 or random.random() < sample)
    ]
    total = sum(item.length for _, _, item in chosen)
    with Meter(progress, Progress("verify", str(location), job_rank(), 0, total, 0.0)) as meter:
        download = Download(store, total, moved=meter.moved)
        download.run(
            read for report, name, item in chosen for read in _reads(location, report, name, item, download.part_size)
        )
    return VerifyReport(str(location), [reports[path] for path in sorted(reports)])


def _sizes(
    store: BlobStore, location: BlobLocation, by_blob: dict[str, list[tuple[str, StoredItem]]]
) -> dict[str, BlobReport]:
    try:
        sizes = _listed_sizes(store, location, by_blob)
    except AccessDeniedError:
        sizes = _requested_sizes(store, location, by_blob)
    reports: dict[str, BlobReport] = {}
    for path, items in by_blob.items():
        size = sizes.get(path)
        expected = max(item.offset + item.length for _, item in items)
        report = reports[path] = BlobReport(path, size, expected, len(items))
        if expected and size is None:
            report.problems.append(f"blob {path} is missing; it holds {_some(name for name, _ in items)}")
        elif size is not None and size < expected:
            lost = _some(name for name, item in items if item.offset + item.length > size)
            report.problems.append(
                f"blob {path} has {size} bytes where {expected} are needed; {lost} lies beyond its end"
            )
    return reports


def _listed_sizes(store: BlobStore, location: BlobLocation, paths: Iterable[str]) -> dict[str, int]:
    """The sizes of those blobs at `paths` that exist, from a listing of each folder of theirs: one for each save."""
    prefix = location.prefix
    sizes = {}
    for folder in sorted({path.rpartition("/")[0] for path in paths}):
        for entry in store.list_folder(f"{prefix}{folder}/" if folder else prefix):
            if not isinstance(entry, str):
                sizes[entry.path[len(prefix) :]] = entry.size
    return sizes


def _requested_sizes(store: BlobStore, location: BlobLocation, paths: Iterable[str]) -> dict[str, int]:
    """Return the sizes of those blobs at `paths` that exist, with a request for each."""
    sizes: dict[str, int] = {}
    cancel = Cancel()

    def look(path: str) -> None:
        with contextlib.suppress(BlobNotFoundError):
            sizes[path] = store.stat(location.join(path).path, cancel=cancel).size

    run_all((functools.partial(look, path) for path in paths), store.options.concurrency, "blob-verify", cancel.cancel)
    return sizes


def _reads(location: BlobLocation, report: BlobReport, name: str, item: StoredItem, part_size: int) -> Iterator[Read]:
    report.checked += 1
    check = None
    if item.crc64 is None:
        report.without_checksum += 1
    else:

        def mismatch(found: int) -> None:
            report.problems.append(crc64_mismatch(name, item, found))

        check = Check(item.crc64, item.length, mismatch)
    path = location.join(item.relative_path).path
    end = item.offset + item.length
    for start in range(item.offset, end, part_size):
        yield Read(path, start, min(part_size, end - start), None, None, check)


def _some(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")

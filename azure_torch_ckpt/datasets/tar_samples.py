"""The samples in one tar file: its members, or groups of them in the layout of WebDataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from azure_torch_ckpt.datasets.tar_archive import TarArchive
from azure_torch_ckpt.datasets.tar_shards import TarShard
from azure_torch_ckpt.errors import TarShardError

__all__ = ["Record", "Sample", "read_members", "read_samples"]

Sample = dict[str, Any]
Record = Sample | TarShardError
"""A sample, or the error of a sample that cannot be made while those after it can."""

_KEY, _URL = "__key__", "__url__"


def read_members(shard: TarShard, begin: int) -> Iterator[tuple[int, Record]]:
    """Yield the files, ``{"url": of the tar file, "name": path in it, "data": bytes}``, each with the offset behind it.

    Args:
        begin: an offset that this function yielded, or 0; in a compressed file, an offset in the decompressed data.

    Raises:
        TarShardError: the tar file is damaged or incomplete.
        StoreError: it cannot be read.
    """
    archive = TarArchive(shard, begin)
    for member, end in archive:
        data = archive.data(member)
        if isinstance(data, TarShardError):
            yield end, data
        elif data is not None:
            yield end, {"url": shard.blob.url, "name": member.name, "data": data}


def read_samples(shard: TarShard, begin: int) -> Iterator[tuple[int, Record]]:
    """Yield one sample for consecutive members with the same path up to the name's first dot; see `read_members`."""
    archive = TarArchive(shard, begin)
    sample: Sample = {}
    error: TarShardError | None = None
    end = begin
    for member, following in archive:
        key, field = _split(member.name)
        data = None if field is None else archive.data(member)
        if field is not None and data is not None:
            if sample and sample[_KEY] != key:
                yield end, error or sample
                sample, error = {}, None
            sample = sample or {_KEY: key, _URL: shard.blob.url}
            if isinstance(data, TarShardError):
                error = error or data
            elif field in sample:
                why = (
                    "which the sample's own entry has. Rename it"
                    if field in (_KEY, _URL)
                    else "regardless of case. Pack each extension once, and another sample under another name"
                )
                error = error or TarShardError(
                    f"{shard.blob.url}: the sample {key!r} has a second member with the extension {field!r}, {why}"
                )
            else:
                sample[field] = data
        end = following
    if sample:
        yield end, error or sample


def _split(name: str) -> tuple[str, str | None]:
    """Return the key and the field of a member; None as the field of a member that WebDataset leaves out."""
    folder, slash, name = name.rpartition("/")
    stem, dot, extension = name.partition(".")
    meta = not slash and name.startswith("__") and name.endswith("__")
    return folder + slash + stem, extension.lower() if stem and dot and not meta else None

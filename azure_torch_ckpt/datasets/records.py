"""What lies in one tar file: its members, and samples in the layout of WebDataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from azure_torch_ckpt.datasets.archive import Archive
from azure_torch_ckpt.datasets.shards import Shard
from azure_torch_ckpt.errors import TarShardError

__all__ = ["Record", "Sample", "members", "samples"]

Sample = dict[str, Any]
Record = Sample | TarShardError
"""An error stands for a sample that cannot be made, while those behind it can."""

_KEY, _URL = "__key__", "__url__"


def members(shard: Shard, begin: int) -> Iterator[tuple[int, Record]]:
    """The files: ``{"url": of the tar file, "name": path in it, "data": bytes}``, each with the offset behind.

    Args:
        begin: an offset that this gave, or 0; in a compressed file, of what it decompresses to.

    Raises:
        TarShardError: the tar file is damaged or not complete.
        StoreError: it cannot be read.
    """
    archive = Archive(shard, begin)
    for member, end in archive:
        data = archive.data(member)
        if isinstance(data, TarShardError):
            yield end, data
        elif data is not None:
            yield end, {"url": shard.blob.url, "name": member.name, "data": data}


def samples(shard: Shard, begin: int) -> Iterator[tuple[int, Record]]:
    """Members that follow each other and have the same path up to the name's first dot, as one; else like `members`."""
    archive = Archive(shard, begin)
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
                    else "in capitals or not. Pack each once, and those of another sample under another name"
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
    """Key and field of a member; no field for what WebDataset leaves out."""
    folder, slash, name = name.rpartition("/")
    stem, dot, extension = name.partition(".")
    meta = not slash and name.startswith("__") and name.endswith("__")
    return folder + slash + stem, extension.lower() if stem and dot and not meta else None

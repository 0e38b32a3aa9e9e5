"""Checkpoints of few items with the metadata of many: an index, read in parts; and it is committed in blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from azure_torch_ckpt.blobs import outcome
from azure_torch_ckpt.dcp import metadata_blob, writer

__all__ = ["COLUMNS", "in_columns", "set_columns", "settings"]

COLUMNS = 0, 1024, 0
"""From how many items on metadata has an index; bytes of the first request for it; from how many on it is in blocks."""

Settings = tuple[int, int, int]


def settings() -> Settings:
    """The same three of this process."""
    return writer._INDEX_FROM, metadata_blob._FIRST, outcome._IN_BLOCKS_FROM


def set_columns(wanted: Settings) -> None:
    """Let this process save and load as `settings` says of another one, or with `COLUMNS`."""
    writer._INDEX_FROM, metadata_blob._FIRST, outcome._IN_BLOCKS_FROM = wanted


@contextlib.contextmanager
def in_columns() -> Iterator[None]:
    """Let this process do so meanwhile, or in a function that is decorated with this."""
    before = settings()
    set_columns(COLUMNS)
    try:
        yield
    finally:
        set_columns(before)

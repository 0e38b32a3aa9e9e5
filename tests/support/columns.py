"""Checkpoints of few items with the metadata of many: an index, of which readers fetch one part after the other."""

from __future__ import annotations

import os

from azure_torch_ckpt.dcp import metadata_blob, writer

__all__ = ["COLUMNS", "set_columns", "settings"]

COLUMNS = 0, 1024
"""From how many items on metadata has an index; bytes of the first request for it."""


def settings() -> tuple[int, int]:
    """The same two of this process."""
    return writer._INDEX_FROM, metadata_blob._FIRST


def set_columns(wanted: tuple[int, int]) -> None:
    """Let this process save and load as `settings` says of another one, or with `COLUMNS`."""
    writer._INDEX_FROM, metadata_blob._FIRST = wanted


if os.environ.get("TEST_COLUMNS"):  # tox -e columns
    set_columns(COLUMNS)

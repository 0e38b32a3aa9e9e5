"""The implementations that are measured at the same work: torch's own storage, and ours with each planner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    SavePlanner,
    StorageReader,
    StorageWriter,
)

import azure_torch_ckpt.dcp
from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter
from tests.benchmarks.spec import Address

STOCK = "stock"
OURS = "ours"
PLANNER = "planner"
BEFORE = "before"


@dataclass(frozen=True)
class Side:
    """How one implementation saves and loads.

    Attributes:
        planner: makes a save planner.
        writer: makes the writer for a path.
        reader: makes the reader for a path.
        url: what ``checkpoint_id=`` is for a path.
        remembers: whether a planner keeps something from one save to the next, so that every rank needs its own.
        address: the server that it uses; None for the file system.
    """

    name: str
    planner: Callable[[], SavePlanner]
    writer: Callable[[str], StorageWriter]
    reader: Callable[[str], StorageReader]
    url: Callable[[str], str]
    remembers: bool
    address: Address | None


def has_planner() -> bool:
    """Whether this version of the package has a planner of its own."""
    return hasattr(azure_torch_ckpt.dcp, "AzureSavePlanner")


def make_side(name: str, address: Address, folder: Path) -> Side:
    """A side by its name; `folder` is where torch's own writer writes."""
    if name == STOCK:
        return Side(
            name,
            DefaultSavePlanner,
            lambda path: FileSystemWriter(folder / path),
            lambda path: FileSystemReader(folder / path),
            lambda path: str(folder / path),
            remembers=False,
            address=None,
        )
    # Looked up by its name, because a version before it is measured with the same code.
    planner = getattr(azure_torch_ckpt.dcp, "AzureSavePlanner") if name == PLANNER else DefaultSavePlanner  # noqa: B009

    def url(path: str) -> str:
        return f"{address.container_url}/{path}"

    return Side(
        name,
        planner,
        lambda path: AzureBlobWriter(url(path), credential=address.key, ca_file=address.ca_file),
        lambda path: AzureBlobReader(url(path), credential=address.key, ca_file=address.ca_file),
        url,
        remembers=name == PLANNER,
        address=address,
    )

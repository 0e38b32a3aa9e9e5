"""The results of `write_data` on all ranks: whether they wrote every byte, and the checksums of whole tensors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.storage import WriteResult

from azure_torch_ckpt._internal.checksums import combine
from azure_torch_ckpt.blobs.upload import Item
from azure_torch_ckpt.errors import IncompleteSaveError
from azure_torch_ckpt.huggingface.block_stager import StagedBlock
from azure_torch_ckpt.huggingface.layout import ItemRuns, ModelLayout
from azure_torch_ckpt.location import BlobLocation

__all__ = ["WrittenItem", "check_whole", "check_written", "checksums_of"]


@dataclass(frozen=True, slots=True)
class WrittenItem:
    """What a rank reports of an item that it wrote.

    Attributes:
        runs: of the item's bytes.
        crc64: CRC64-NVME of each run; None without checksums.
        blocks: all blocks of the rank, with its first item.
    """

    runs: ItemRuns
    crc64: tuple[int, ...] | None
    blocks: tuple[StagedBlock, ...] = ()


def check_written(layout: ModelLayout, location: BlobLocation, blocks: Mapping[str, Sequence[StagedBlock]]) -> None:
    """Check that the ranks have staged as many bytes as planned, before anything is read or committed.

    Args:
        blocks: by the paths of the blobs.

    Raises:
        IncompleteSaveError: they have not.
    """
    expected = {file.name: file.length for file in layout.files} | layout.shards
    for tensor in layout.joined:
        expected[tensor.file] -= tensor.length
    for name, length in expected.items():
        staged = sum(block.length for block in blocks.get(location.join(name).path, ()))
        if staged != length:
            raise _incomplete(name, staged, length, location)


def check_whole(layout: ModelLayout, location: BlobLocation, blocks: Mapping[str, Sequence[StagedBlock]]) -> None:
    """Check that the blocks of each file follow one another from its first byte to its last.

    Raises:
        IncompleteSaveError: they do not.
    """
    for file in layout.files:
        position = 0
        for block in sorted(blocks.get(location.join(file.name).path, ()), key=lambda one: one.offset):
            if block.offset != position:
                break
            position += block.length
        if position != file.length:
            raise _incomplete(file.name, position, file.length, location)


def _incomplete(name: str, written: int, length: int, location: BlobLocation) -> IncompleteSaveError:
    return IncompleteSaveError(
        f"Of {name} the ranks wrote {written} of {length} bytes without a gap, so nothing was committed at {location}. "
        "A rank or a planner dropped something; save again"
    )


def checksums_of(results: Sequence[Sequence[WriteResult]], joined: Mapping[str, list[Item]]) -> dict[str, int]:
    """Combine the CRC64 of each tensor from its runs, in their order.

    Args:
        joined: the items of the tensors that were joined, which count instead of the ranks' chunks.
    """
    parts: dict[str, list[tuple[int, int, int]]] = {}
    for result in itertools.chain.from_iterable(results):
        if result.index.fqn not in joined:
            runs = result.storage_data.runs
            sums = zip(runs.starts, result.storage_data.crc64, strict=True)
            parts.setdefault(result.index.fqn, []).extend((start, runs.run, crc) for start, crc in sums)
    for name, items in joined.items():
        parts[name] = [(item.offset, item.length, item.crc64()) for item in items]
    return {
        name: functools.reduce(lambda crc, part: combine(crc, part[2], part[1]), sorted(of_tensor), 0)
        for name, of_tensor in parts.items()
    }

"""What the ranks tell of what they have written: whether that is everything, and the checksums of whole tensors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.storage import WriteResult

from azure_torch_ckpt._internal.checksums import combine
from azure_torch_ckpt.blobs.transfer import Item
from azure_torch_ckpt.errors import IncompleteSaveError
from azure_torch_ckpt.huggingface.blocks import Block
from azure_torch_ckpt.huggingface.layout import Arrangement, Place
from azure_torch_ckpt.location import BlobLocation

__all__ = ["Written", "check_whole", "check_written", "checksums_of"]


@dataclass(frozen=True, slots=True)
class Written:
    """What a rank tells of an item: its place, the checksum of each run, and with its first item all its blocks."""

    place: Place
    crc64: tuple[int, ...] | None
    blocks: tuple[Block, ...] = ()


def check_written(plan: Arrangement, location: BlobLocation, blocks: Mapping[str, Sequence[Block]]) -> None:
    """See that the ranks have staged all bytes, before anything is read or committed.

    Args:
        blocks: by the paths of the blobs.

    Raises:
        IncompleteSaveError: they have not.
    """
    expected = {file.name: file.length for file in plan.files} | plan.shards
    for tensor in plan.scattered:
        expected[tensor.file] -= tensor.length
    for name, length in expected.items():
        staged = sum(block.length for block in blocks.get(location.join(name).path, ()))
        if staged != length:
            raise _incomplete(name, staged, length, location)


def check_whole(plan: Arrangement, location: BlobLocation, blocks: Mapping[str, Sequence[Block]]) -> None:
    """See that the blocks of each file follow one another from its first byte to its last.

    Raises:
        IncompleteSaveError: they do not.
    """
    for file in plan.files:
        position = 0
        for block in sorted(blocks.get(location.join(file.name).path, ()), key=lambda one: one.offset):
            if block.offset != position:
                break
            position += block.length
        if position != file.length:
            raise _incomplete(file.name, position, file.length, location)


def _incomplete(name: str, there: int, length: int, location: BlobLocation) -> IncompleteSaveError:
    return IncompleteSaveError(
        f"Of {name} the ranks wrote {there} of {length} bytes without a gap, so nothing was committed at {location}. A "
        "rank or a planner dropped something; save again"
    )


def checksums_of(results: Sequence[Sequence[WriteResult]], joined: Mapping[str, list[Item]]) -> dict[str, int]:
    """The CRC64 of each tensor, from those of its runs in their order.

    Args:
        joined: of the tensors that were joined, their parts instead.
    """
    parts: dict[str, list[tuple[int, int, int]]] = {}
    for result in itertools.chain.from_iterable(results):
        if result.index.fqn not in joined:
            place = result.storage_data.place
            runs = zip(place.starts, result.storage_data.crc64, strict=True)
            parts.setdefault(result.index.fqn, []).extend((start, place.run, crc) for start, crc in runs)
    for name, items in joined.items():
        parts[name] = [(item.offset, item.length, item.crc64()) for item in items]
    return {
        name: functools.reduce(lambda crc, part: combine(crc, part[2], part[1]), sorted(runs), 0)
        for name, runs in parts.items()
    }

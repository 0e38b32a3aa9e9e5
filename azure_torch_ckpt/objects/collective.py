"""Steps that all ranks take together: one that fails on a rank fails on all of them, and nobody waits for the lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from azure_torch_ckpt.errors import AzureCheckpointError, CheckpointError

__all__ = ["together"]

_Result = TypeVar("_Result")


def together(work: Callable[[], _Result]) -> _Result:
    """What `work` returns on this rank, once it has succeeded on every rank of the default process group.

    Raises:
        What `work` raised on this rank.
        AzureCheckpointError: it raised on another; the error of the lowest such rank.
    """
    result: list[_Result] = []
    failure: Exception | None = None
    try:
        result.append(work())
    except Exception as error:
        failure = error
    told: list[AzureCheckpointError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if failure is None else _to_tell(failure))
    if failure is not None:
        raise failure
    for theirs in told:
        if theirs is not None:
            raise theirs
    return result[0]


def _to_tell(error: Exception) -> AzureCheckpointError:
    """The error, if all ranks can unpickle it."""
    if isinstance(error, AzureCheckpointError):
        return error
    return CheckpointError(f"It failed on rank {dist.get_rank()}: {type(error).__name__}: {error}")

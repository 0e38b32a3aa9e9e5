"""Steps that all ranks take, with collective errors: if one rank fails, every rank raises, so none waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from azure_torch_ckpt.errors import AzureCheckpointError, CheckpointError

__all__ = ["run_on_all_ranks"]

_Result = TypeVar("_Result")


def run_on_all_ranks(work: Callable[[], _Result]) -> _Result:
    """Call `work` on every rank of the default process group, and return once it has succeeded on all of them.

    Returns:
        The result of `work` on this rank.

    Raises:
        Whatever `work` raised on this rank.
        AzureCheckpointError: `work` raised on another rank. The error is that of the lowest such rank.
    """
    result: list[_Result] = []
    failure: Exception | None = None
    try:
        result.append(work())
    except Exception as error:
        failure = error
    errors: list[AzureCheckpointError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if failure is None else _picklable(failure))
    if failure is not None:
        raise failure
    for error_of_rank in errors:
        if error_of_rank is not None:
            raise error_of_rank
    return result[0]


def _picklable(error: Exception) -> AzureCheckpointError:
    """The error itself, if all ranks can unpickle it; else one that quotes it."""
    if isinstance(error, AzureCheckpointError):
        return error
    return CheckpointError(f"Rank {dist.get_rank()} failed: {type(error).__name__}: {error}")

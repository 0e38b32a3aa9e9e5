"""Saves and loads that must fail: the errors that torch reports, and a container that must not change.

Everything here can be called in the test's process and on the ranks of `tests/support/ranks.py`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter, TransferOptions
from tests.support import sharded
from tests.support.containers import KEY, snapshot
from tests.support.waits import waiting_at_most

if TYPE_CHECKING:
    from tests.support.ranks import Ranks

_E = TypeVar("_E", bound=BaseException)

# So that a request to a dead service fails soon.
IMPATIENT = TransferOptions(retry_seconds=1)


def save(
    url: str,
    version: int,
    *,
    planner: dcp.SavePlanner | None = None,
    no_dist: bool = False,
    **options: Any,
) -> None:
    """Save whole tensors; on ranks sharded ones, unless `no_dist` leaves the other ranks out."""
    make = sharded.rows if dist.is_initialized() and not no_dist else sharded.plain
    writer = AzureBlobWriter(url, **{"credential": KEY, **options})
    dcp.save(make(version), storage_writer=writer, planner=planner, no_dist=no_dist)


def load(
    url: str, state: dict[str, Any] | None = None, *, planner: dcp.LoadPlanner | None = None, **options: Any
) -> None:
    """Load `state`, or all that `save` saves."""
    if state is None:
        state = sharded.empty(sharded.rows() if dist.is_initialized() else sharded.plain())
    dcp.load(state, storage_reader=AzureBlobReader(url, **{"credential": KEY, **options}), planner=planner)


def raised(
    kind: type[_E], attempt: Callable[[], object], says: str, *, ranks: Sequence[int] = (0,), seconds: float = 8.0
) -> _E:
    """Check that `attempt` fails on exactly these ranks, each with this kind of error; return the first rank's.

    Args:
        says: a regular expression that all messages match.
        seconds: how long a thread may have waited, in all, before requests that it tried again.
    """
    with waiting_at_most(seconds), pytest.raises(CheckpointException) as caught:
        attempt()
    failures = {rank: error for rank, (error, _) in caught.value.failures.items()}
    assert list(failures) == list(ranks), failures
    for error in failures.values():
        assert type(error) is kind, repr(error)
        assert re.search(says, str(error)), str(error)
    first = next(iter(failures.values()))
    assert isinstance(first, kind)
    return first


@contextlib.contextmanager
def unchanged(url: str) -> Iterator[None]:
    """Nothing in the container of `url` is written or removed."""
    before = snapshot(url)
    yield
    assert snapshot(url) == before


def raised_on_ranks(
    kind: type[BaseException], attempt: Callable[[str], object], url: str, says: str, failed: Sequence[int]
) -> None:
    """`raised`, to be run by a group of ranks: each of them gets the errors of all."""
    raised(kind, lambda: attempt(url), says, ranks=failed)


def raised_everywhere(
    ranks: Ranks,
    kind: type[_E],
    attempt: Callable[[str], object],
    url: str,
    says: str,
    *,
    failed: Sequence[int] = (0, 1),
) -> _E:
    """`raised` in this process, and then on two ranks, of which those in `failed` fail.

    Nothing in the container changes. Returns the error of this process.
    """
    with unchanged(url):
        error = raised(kind, lambda: attempt(url), says)
        ranks(2).run(raised_on_ranks, kind, attempt, url, says, failed)
    return error

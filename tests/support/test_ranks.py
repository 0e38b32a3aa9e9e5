"""The harness of the tests on many ranks: errors come back, hangs end with a stack, no process is left."""

from __future__ import annotations

import os
import select
import threading

import pytest
import torch.distributed as dist

from tests.support.ranks import RankError, RankGroup


def who() -> tuple[int, int]:
    return dist.get_rank(), os.getpid()


def hang() -> None:
    threading.Event().wait()


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("only here")


def ends(process: int) -> bool:
    """Whether the process behind a file descriptor of `os.pidfd_open` ends within the time that a SIGKILL may take."""
    readable, _, _ = select.select([process], [], [], 60.0)
    os.close(process)
    return bool(readable)


def test_a_hanging_function_is_reported_with_its_stack_and_its_process_is_gone() -> None:
    for seconds in (2.0, 30.0):  # longer only where the machine takes its time to call the function
        group = RankGroup(1)
        [(rank, pid)] = group.run(who)
        assert rank == 0
        process = os.pidfd_open(pid)
        with pytest.raises(RankError, match="rank 0 did not end") as caught:
            group.run(hang, seconds=seconds)
        assert not group.alive
        assert ends(process)
        if "in hang" in str(caught.value):
            break
    assert "in hang" in str(caught.value)


def test_an_error_on_one_rank_is_reported_and_ends_the_group() -> None:
    group = RankGroup(2)
    (first, _), (second, pid) = group.run(who)
    assert (first, second) == (0, 1)
    process = os.pidfd_open(pid)
    with pytest.raises(RankError, match=r"rank 1 raised\n(?s:.*)ValueError: only here"):
        group.run(fail_on_one)
    assert not group.alive
    assert ends(process)

"""The layout of a model: which shards are joined, and which plans are refused."""

from __future__ import annotations

import pytest

from azure_torch_ckpt import CheckpointError
from tests.huggingface.plans import columns, laid_out, plan


def test_short_runs_are_joined_and_long_ones_are_not() -> None:
    assert laid_out(columns(of=100, rows=1, ranks=3)).joined == []  # one row
    assert laid_out(columns(of=100, rows=50, ranks=1)).joined == []
    assert laid_out(columns(of=1 << 20, rows=2, ranks=2)).joined == []  # runs of 2 MiB
    [joined] = laid_out(columns(of=100, rows=50, ranks=3)).joined
    assert joined.length == 100 * 50 * 4 and [chunk.length for chunk in joined.chunks] == [6_600, 6_600, 6_800]
    # Not so many runs that the blob would have too many blocks.
    assert len(laid_out(columns(of=1 << 20, rows=12_000, ranks=4), joined_block_size=8 << 20).joined) == 1


def test_many_shards_are_checked_quickly_and_not_twice() -> None:
    plans = columns(of=4_096, rows=8, ranks=2_048)
    assert len(laid_out(plans).joined[0].chunks) == 2_048
    with pytest.raises(CheckpointError, match="the same elements of 'w'"):
        laid_out([*plans, plans[7]])


@pytest.mark.parametrize(
    ("plans", "reason"),
    [
        ([((0, 4), 8)], "16 of the 32 bytes of 'w'"),
        ([((0, 4), 8), ((5, 8), 8)], "28 of the 32 bytes of 'w'"),
        ([((0, 4), 8), ((3, 8), 8)], "Ranks 0 and 1 save the same elements of 'w'"),
        ([((0, 4), 8), ((4, 9), 8)], "Rank 1 saves"),
        ([((0, 4), 8), ((4, 9), 9)], "on rank 1"),
    ],
)
def test_a_tensor_that_the_ranks_do_not_save_whole_is_refused(plans: list[tuple[tuple[int, int], int]], reason: str):
    """torch's own planner would notice; others need not."""
    with pytest.raises(CheckpointError, match=reason):
        laid_out([plan([cut], [of]) for cut, of in plans])


def test_no_file_gets_more_blocks_than_a_blob_may_have():
    mib = 1 << 20
    plans = [plan([(0, 30_000 * mib)], [30_000 * mib], name) for name in ("a", "b")]  # of four bytes each
    assert len(laid_out(plans, block_size=8 * mib).files) == 1
    assert len(laid_out(plans, block_size=4 * mib).files) == 2
    with pytest.raises(CheckpointError, match="'a' would consist of"):
        laid_out(plans, block_size=2 * mib)
    with pytest.raises(CheckpointError, match="file 1 of fqn_to_index_mapping"):
        laid_out(plans, block_size=4 * mib, mapping={"a": 1, "b": 1})

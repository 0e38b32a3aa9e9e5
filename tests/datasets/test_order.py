"""Which samples a rank and a worker read, in which order: sharding, shuffling, resuming. Needs no storage."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azure_torch_ckpt.datasets import BlobDataset, BlobListing, BlobSampler
from azure_torch_ckpt.datasets.order import Permutation, Share, Uneven, this_rank

URL = "https://account.blob.core.windows.net/data"
FIRST_OF_SEED_1_EPOCH_2 = [7, 52, 24, 69, 46, 43, 86, 84]


def in_turns(shares: list[Share]) -> list[int]:
    """Return what a DataLoader collects from its workers: a batch from each in turn, skipping those that have ended."""
    sources = [iter([share.position(index) for index in range(len(share))]) for share in shares]
    found: list[int] = []
    while sources:
        batches = [list(itertools.islice(source, shares[0].batch_size)) for source in sources]
        found += [position for batch in batches for position in batch]
        sources = [source for source, batch in zip(sources, batches, strict=True) if batch]
    return found


@given(count=st.integers(1, 5000), seed=st.integers(0, 2**64), epoch=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_permutation_has_every_number_once(count: int, seed: int, epoch: int):
    order = Permutation(count, seed, epoch)
    assert sorted(order[position] for position in range(count)) == list(range(count))


def test_a_permutation_depends_on_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[int]:
        permutation = Permutation(100, seed, epoch)
        return [permutation[position] for position in range(100)]

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    # A constant, because a release must not change the order of a run that will be resumed.
    assert order(1, 2)[:8] == FIRST_OF_SEED_1_EPOCH_2


def test_all_permutations_are_about_equally_frequent():
    count, trials = 4, 4800
    found = Counter(
        tuple(order[position] for position in range(count))
        for order in (Permutation(count, 5, epoch) for epoch in range(trials))
    )
    expected = trials / 24
    # Chi-square with 23 degrees of freedom: beyond 49.7 by chance once in a thousand.
    assert len(found) == 24
    assert sum((number - expected) ** 2 / expected for number in found.values()) < 49.7


def test_neighbours_do_not_stay_neighbours():
    order = Permutation(10_000, 0, 0)
    numbers = [order[position] for position in range(10_000)]
    mean = sum(abs(a - b) for a, b in itertools.pairwise(numbers)) / 9_999
    assert 3_200 < mean < 3_460  # of a random order: a third of 10,000, with a deviation of some 24


@given(
    count=st.integers(0, 60),
    world_size=st.integers(1, 5),
    workers=st.integers(1, 5),
    batch_size=st.integers(1, 7),
    base=st.integers(0, 70),
)
@settings(max_examples=150, deadline=None)
def test_shares_cover_the_order_whatever_the_numbers(
    count: int, world_size: int, workers: int, batch_size: int, base: int
):
    rest = list(range(min(base, count), count))
    for uneven in get_args(Uneven):
        by_rank = []
        for rank in range(world_size):
            shares = [
                Share(count, base, rank, world_size, worker, workers, batch_size, uneven) for worker in range(workers)
            ]
            by_rank.append(in_turns(shares))
            # The number of workers does not matter, because they take turns by batches.
            assert by_rank[-1] == in_turns([Share(count, base, rank, world_size, uneven=uneven)])
        order = [position for step in itertools.zip_longest(*by_rank) for position in step if position is not None]
        if uneven == "keep":
            assert order == rest
        elif uneven == "drop":
            assert order == rest[: len(rest) // world_size * world_size]
        else:
            assert order[: len(rest)] == rest
            assert len(order) == -(-len(rest) // world_size) * world_size
        lengths = {len(positions) for positions in by_rank}
        assert max(lengths) - min(lengths) <= (uneven == "keep")


def listing(count: int) -> BlobListing:
    return BlobListing.from_blob_urls(f"{URL}/{number}" for number in range(count))


def sampler(count: int, rank: int, world_size: int, **settings: Any) -> BlobSampler:
    return BlobSampler(BlobDataset(listing(count)), rank=rank, world_size=world_size, shuffle=True, seed=3, **settings)


def test_a_state_can_be_asked_for_by_the_number_of_samples():
    one = sampler(20, 1, 3)
    source = iter(one)
    for _ in range(4):
        next(source)
    expected = one.state_dict()
    resumed = sampler(20, 1, 3)
    resumed.load_state_dict(one.state_at(4))
    assert list(resumed) == list(source)
    resumed.load_state_dict(expected)
    next(iter(resumed))
    resumed.load_state_dict(resumed.state_at(1))
    assert list(resumed) == list(sampler(20, 1, 3))[5:]


def test_set_epoch_keeps_a_loaded_state_of_that_epoch_and_drops_that_of_another():
    one = sampler(20, 0, 1)
    one.set_epoch(4)
    source = iter(one)
    first = [next(source) for _ in range(5)]
    state = one.state_dict()
    resumed = sampler(20, 0, 1)
    resumed.load_state_dict(state)
    resumed.set_epoch(4)
    assert first + list(resumed) == list(one)
    resumed.load_state_dict(state)
    resumed.set_epoch(5)
    one.set_epoch(5)
    assert list(resumed) == list(one) and len(list(one)) == 20


def test_a_state_of_another_dataset_or_order_is_refused():
    state = sampler(20, 0, 1).state_dict()
    with pytest.raises(ValueError, match="another dataset"):
        sampler(21, 0, 1).load_state_dict(state)
    other = BlobListing.from_blob_urls(f"{URL}/x{number}" for number in range(20))
    with pytest.raises(ValueError, match="another dataset"):
        BlobSampler(BlobDataset(other), shuffle=True, seed=3, rank=0, world_size=1).load_state_dict(state)
    with pytest.raises(ValueError, match="another order"):
        BlobSampler(BlobDataset(listing(20)), shuffle=True, seed=4, rank=0, world_size=1).load_state_dict(state)


def test_the_rank_is_torchruns_by_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    assert this_rank(None, None) == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert this_rank(None, None) == (2, 3)
    assert this_rank(0, 1) == (0, 1)
    with pytest.raises(ValueError, match="both"):
        this_rank(1, None)


@pytest.mark.parametrize(
    "wrong", [{"rank": 3, "world_size": 3}, {"rank": -1, "world_size": 1}, {"uneven": "wrap"}], ids=str
)
def test_invalid_shares_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=r"rank must|uneven must"):
        BlobSampler(BlobDataset(listing(5)), **wrong)

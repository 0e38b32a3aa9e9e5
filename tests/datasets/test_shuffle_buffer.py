"""`shuffled`: its order, its size, and that passes are resumed exactly. Needs no storage."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from azure_torch_ckpt.datasets.epoch_state import StreamPosition
from azure_torch_ckpt.datasets.order import Permutation
from azure_torch_ckpt.datasets.tar_dataset import shuffled


def order(count: int, begin: tuple[int, int]) -> Permutation:
    return Permutation(count, 7, *begin)


class Shards:
    """Yields samples ``(shard, number)`` and counts them. A broken shard ends with a None.

    Args:
        counts: samples of each shard.
        broken: shards whose rest cannot be read.
    """

    def __init__(self, counts: list[int], broken: frozenset[int] = frozenset()) -> None:
        self.counts = counts
        self.broken = broken
        self.read = 0

    def begin(self, place: StreamPosition) -> Iterator[tuple[tuple[int, int] | None, tuple[int, int]]]:
        first = place.offset
        for shard in range(place.position, len(self.counts)):
            for number in range(first, self.counts[shard]):
                self.read += 1
                yield (shard, number), (shard, number + 1)
            first = 0
            if shard in self.broken:
                yield None, (shard + 1, 0)

    def all(self) -> list[tuple[int, int]]:
        return [(shard, number) for shard, count in enumerate(self.counts) for number in range(count)]


some_shards = st.lists(st.integers(0, 6), max_size=6)


@given(counts=some_shards, size=st.integers(1, 9), broken=st.frozensets(st.integers(0, 5)))
@settings(max_examples=200, deadline=None)
def test_a_pass_is_resumed_after_every_sample(counts: list[int], size: int, broken: frozenset[int]):
    source = Shards(counts, broken)
    given_out = list(shuffled(source.begin(StreamPosition(0)), size, StreamPosition(0), order))
    samples = [sample for sample, _ in given_out]
    assert sorted(samples) == source.all()
    for done, (_, place) in enumerate(given_out, 1):
        again = Shards(counts, broken)
        rest = [sample for sample, _ in shuffled(again.begin(place), size, place, order)]
        assert rest == samples[done:]
        # A resumed pass reads the block again, and the samples that the buffer has taken since.
        assert again.read <= len(samples) - done + size


@given(counts=some_shards, size=st.integers(1, 9), broken=st.frozensets(st.integers(0, 5), min_size=1))
@settings(max_examples=100, deadline=None)
def test_a_shard_that_can_be_read_again_costs_and_repeats_no_sample(
    counts: list[int], size: int, broken: frozenset[int]
):
    # The broken shards have two samples more, which only a later pass can read.
    healed = [count + 2 * (shard in broken) for shard, count in enumerate(counts)]
    given_out = list(shuffled(Shards(counts, broken).begin(StreamPosition(0)), size, StreamPosition(0), order))
    samples = [sample for sample, _ in given_out]
    for done, (_, place) in enumerate(given_out, 1):
        rest = [sample for sample, _ in shuffled(Shards(healed).begin(place), size, place, order)]
        assert len(set(rest)) == len(rest) and not set(rest) & set(samples[:done])
        assert set(rest) >= set(samples[done:])


@given(counts=some_shards, size=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_the_buffer_holds_no_more_than_its_size(counts: list[int], size: int):
    source = Shards(counts)
    expected = source.all()
    for done, (sample, _) in enumerate(shuffled(source.begin(StreamPosition(0)), size, StreamPosition(0), order)):
        assert source.read - done <= size
        assert abs(expected.index(sample) - done) < size
    assert size > 1 or expected == [
        sample for sample, _ in shuffled(source.begin(StreamPosition(0)), 1, StreamPosition(0), order)
    ]


def test_a_buffer_of_a_thousand_samples_shuffles():
    source = Shards([5_000] * 2)
    found = [
        shard * 5_000 + number
        for (shard, number), _ in shuffled(source.begin(StreamPosition(0)), 1000, StreamPosition(0), order)
    ]
    distances = [abs(number - position) for position, number in enumerate(found)]
    # In a random order of a thousand, a sample is a third of them away from its place: 333, with a deviation of some 3.
    assert 320 < sum(distances) / len(distances) < 347

"""A loaded state is for one pass on any number of workers: exactly the rest of the epoch, then whole epochs.

Simulated workers run any sequence of passes. Real ones are in test_resume.py.
"""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from azure_torch_ckpt.datasets.order import Uneven
from azure_torch_ckpt.errors import ConfigurationError
from tests.datasets.sample_blobs import join
from tests.datasets.simulated_loader import Loader, Numbers, Worker

_PERSISTENT_LATE: list[tuple[Any, ...]] = [
    (0, False, "", None, "here", 1, frozenset(), False, False),
    (2, True, "", None, "here", 1, frozenset(), False, False),
    (2, True, "", 1, "here", 1, frozenset({1}), False, False),
]


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    return draw(
        st.lists(
            st.tuples(
                st.integers(0, 3),  # workers
                st.booleans(),  # the loader of this number of workers, which persist, or a new one
                st.sampled_from(["", "", "same", "next"]),  # set_epoch before the pass
                st.one_of(st.none(), st.integers(1, 4)),  # batches before the pass is left and resumed, if it is
                st.sampled_from(["here", "anew", "nowhere"]),  # load into this dataset, a new one, or do not
                st.integers(1, 3),  # ranks of the new one
                st.frozensets(st.integers(0, 2)),  # workers that begin late
                st.booleans(),  # the same seed for all loaders, as with manual_seed before each pass
                st.booleans(),  # late workers of the pass before, of which nothing was wanted, begin after this pass
            ),
            min_size=1,
            max_size=6,
        )
    )


# A loaded state, and two passes of two workers with the same seed; and one whose second worker begins after a load.
@example(
    [
        (0, False, "", 1, "here", 1, frozenset(), False, False),
        *[(2, False, "", None, "", 1, frozenset(), True, False)] * 2,
    ],
    9,
    2,
    1,
    False,
)
@example(
    [
        (2, False, "", 1, "here", 1, frozenset({1}), False, False),
        (1, False, "", None, "", 1, frozenset(), False, False),
    ],
    9,
    2,
    1,
    False,
)
# Of workers that persist, the second one begins its second pass after a load; then follows a whole pass, or a part.
@example([*_PERSISTENT_LATE, (0, False, "", None, "here", 1, frozenset(), False, False)], 1, 1, 1, False)
@example([*_PERSISTENT_LATE, (0, False, "", 1, "here", 1, frozenset(), False, False)], 2, 1, 1, False)
# And the first one begins its third pass before the second one has begun the second.
@example([*_PERSISTENT_LATE, (2, True, "", None, "here", 1, frozenset(), False, False)], 9, 1, 1, False)
@given(
    program=steps(),
    count=st.integers(0, 20),
    batch_size=st.integers(1, 3),
    world_size=st.integers(1, 3),
    shuffle=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_any_sequence_of_passes_gives_what_remains_and_then_whole_epochs(
    program: list[tuple[Any, ...]], count: int, batch_size: int, world_size: int, shuffle: bool
):
    def make(ranks: int) -> list[Numbers]:
        return [
            Numbers(count, rank=rank, world_size=ranks, batch_size=batch_size, shuffle=shuffle) for rank in range(ranks)
        ]

    def order(epoch: int) -> list[int]:
        whole = Numbers(count, rank=0, world_size=1, shuffle=shuffle)
        whole.set_epoch(epoch)
        return list(whole)

    def begin_the_rest(loaders: list[Loader]) -> None:
        for loader in loaders:
            loader.begin_the_rest()

    seeds = itertools.count(100)
    datasets, kept = make(world_size), dict[int, list[Loader]]()
    epoch = done = 0
    left: list[Loader] = []
    for workers, persistent, setting, leave, where, ranks, late, same_seed, afterwards in program:
        if setting:
            epoch += setting == "next"
            done = 0 if setting == "next" else done
            for dataset in datasets:
                dataset.set_epoch(epoch)
        seed = 7 if same_seed else next(seeds)
        loaders = kept.get(workers) if persistent else None
        if loaders is None:
            loaders = [Loader(dataset, batch_size, workers, seed, persistent) for dataset in datasets]
            if persistent:
                kept[workers] = loaders
        if left == loaders:  # these workers persist, and begin one pass after the other
            left = []
        # Passes of the same seed in one epoch cannot be told apart by a worker that is the first of its number. A loop
        # that is left waits for workers that do not persist: they end when they have begun.
        if not afterwards or {loader.seed for loader in left} & {loader.seed for loader in loaders}:
            begin_the_rest(left)
            left = []
        rest = order(epoch)[done:]
        steps_of_all = len(rest) // (len(datasets) * batch_size)
        passes = [loader.batches(late) for loader in loaders]
        if leave is None or leave > steps_of_all:
            by_rank = [join(batches) for batches in passes]
            found = [number for step in itertools.zip_longest(*by_rank) for number in step if number is not None]
            assert found == rest
            done = 0
            begin_the_rest(left)
            left = []
            continue
        by_rank = [join(itertools.islice(batches, leave)) for batches in passes]
        found = [number for step in zip(*by_rank, strict=True) for number in step]
        samples = leave * batch_size
        done += samples * len(datasets)
        assert found == rest[: samples * len(datasets)]
        begin_the_rest(left)
        states = [dataset.state_at(samples) for dataset in datasets]
        if workers:
            for dataset in datasets:
                with pytest.raises(ValueError, match="StatefulDataLoader"):
                    dataset.state_dict()
        else:
            assert [dataset.state_dict() for dataset in datasets] == states
        for one in states:  # one state serves all ranks
            assert one == {**states[0], "share": {**states[0]["share"], "rank": one["share"]["rank"]}}
        if where == "anew":
            datasets, kept = make(ranks), {}
        left = loaders
        if where == "nowhere":
            done = 0
            continue
        for dataset in datasets:
            dataset.load_state_dict(states[-1])


def test_set_epoch_after_a_pass_begins_also_the_epoch_of_a_loaded_state():
    dataset = Numbers(9, rank=0, world_size=1)
    dataset.load_state_dict(dataset.state_at(4))
    dataset.set_epoch(0)
    assert dataset.state_dict() == dataset.state_at(0) != Numbers(9, rank=0, world_size=1).state_dict()
    assert join(Loader(dataset, 1, 2, 5, False).batches()) == [4, 5, 6, 7, 8]
    assert dataset.state_at(5) == {**Numbers(9, rank=0, world_size=1).state_at(5), **dataset.state_at(5)}
    dataset.set_epoch(0)
    assert dataset.state_dict() == dataset.state_at(0) == Numbers(9, rank=0, world_size=1).state_dict()


def test_a_worker_that_goes_through_the_epochs_by_itself_does_not_disturb_the_others():
    """An IterableDataset around this one does that, if its `__iter__` never ends."""
    dataset = Numbers(12, rank=0, world_size=1, shuffle=True)
    dataset.set_epoch(1)
    dataset.load_state_dict(dataset.state_at(4))
    workers = [Worker(dataset, number, 2, 5) for number in range(2)]
    found: dict[int, list[int]] = {1: [], 2: []}
    for epoch, number in ((1, 0), (2, 0), (1, 1), (2, 1)):
        with workers[number].running():
            workers[number].dataset.set_epoch(epoch)
            found[epoch] += list(workers[number].dataset)
    whole = {}
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        whole[epoch] = list(dataset)
    assert sorted(found[1]) == sorted(whole[1][4:])
    assert sorted(found[2]) == sorted(whole[2])


def test_a_state_beyond_the_end_of_the_epoch():
    for world_size in (1, 2):
        dataset = Numbers(9, rank=0, world_size=world_size)
        dataset.load_state_dict(dataset.state_at(12))  # three batches of four
        assert list(dataset) == []
        assert list(dataset) == list(range(0, 9, world_size))


def test_an_invalid_state_is_refused():
    dataset = Numbers(9, rank=0, world_size=2)
    dataset.load_state_dict(dataset.state_at(3))
    with pytest.raises(ConfigurationError, match="must not be negative"):
        dataset.state_at(-1)
    before = dataset.state_dict()
    state = dataset.state_at(1)
    some_wrong: tuple[dict[str, Any], ...] = (
        {},
        {"_snapshot": {}},
        {**state, "share": None},
        {**state, "epoch": "x"},
        {**state, "share": {"a": 1}},
    )
    for wrong in some_wrong:
        with pytest.raises(ConfigurationError, match="not the state of a dataset"):
            dataset.load_state_dict(wrong)
    assert dataset.state_dict() == before


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("uneven", get_args(Uneven))
def test_an_epoch_goes_on_with_other_numbers_of_ranks_and_workers(before: int, after: int, uneven: Uneven):
    for count, batches in itertools.product((0, 7, 12), (0, 1, 2)):
        passes = []
        settings: dict[str, Any] = {"batch_size": 2, "uneven": uneven}
        for rank in range(before):
            dataset = Numbers(count, rank=rank, world_size=before, **settings)
            if len(dataset) < 2 * batches:
                break
            batch = itertools.islice(Loader(dataset, 2, 2, 1, False).batches(), batches)
            passes.append((join(batch), dataset.state_at(2 * batches)))
        else:
            found = [number for numbers, _ in passes for number in numbers]
            assert sorted(found) == sorted(number % count for number in range(len(found)))
            rest: list[int] = []
            for rank in range(after):
                dataset = Numbers(count, rank=rank, world_size=after, **settings)
                dataset.load_state_dict(passes[-1][1])
                rest += join(Loader(dataset, 2, 3, 1, False).batches())
                assert join(Loader(dataset, 2, 1, 2, False).batches()) == list(
                    Numbers(count, rank=rank, world_size=after, **settings)
                )
            left = max(count - len(found), 0)
            if uneven == "drop":
                assert sorted(rest) == list(range(len(found), len(found) + left // after * after))
            else:
                more = -left % after if uneven == "pad" else 0
                assert sorted(rest) == sorted([*range(len(found), count), *(n % count for n in range(more))])

"""A shuffle buffer that is resumed from four numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from azure_torch_ckpt.datasets.order import Permutation
from azure_torch_ckpt.datasets.progress import Place

__all__ = ["shuffled"]

_T = TypeVar("_T")
_Begin = tuple[int, int]


@dataclass(slots=True)
class _Block(Generic[_T]):
    """Samples that follow each other from `begin` on.

    Attributes:
        closed: no more will be added.
    """

    begin: _Begin
    samples: list[_T | None] = field(default_factory=list)
    closed: bool = False


def shuffled(
    source: Iterator[tuple[_T | None, _Begin]],
    size: int,
    place: Place,
    order: Callable[[int, _Begin], Permutation | range],
) -> Iterator[tuple[_T, Place]]:
    """Shuffle a stream by blocks of `size` samples: a random one is drawn from a block, and the next block gets one.

    So `size` samples are held at any time, the first comes when so many are read, and none moves by more than that.
    In exchange, a pass can be resumed exactly: from the begin of its block, of which the first few are drawn already.
    At most twice `size` samples are read again for that, and none is kept in the state.

    Args:
        source: samples from `place` on, each with the position and offset behind it; None in the place of those that
            are left out. That ends a block, so that one that is read again has the same samples, even if those can be
            read then.
        place: where to go on.
        order: a permutation of so many, for a block that begins there.

    Returns:
        samples, each with the place to go on behind it.
    """
    reached = place[:2]

    def fill(block: _Block[_T], count: int) -> None:
        nonlocal reached
        while len(block.samples) < count and not block.closed:
            item = next(source, None)
            if item is None:
                block.closed = True
                return
            sample, reached = item
            if sample is not None:
                block.samples.append(sample)
            elif block.samples:
                block.closed = True
            else:
                block.begin = reached

    block = _Block[_T](reached)
    drawn = place.drawn
    fill(block, place.block if drawn else size)
    while block.samples:
        following = _Block[_T](reached)
        count = len(block.samples)
        numbers = order(count, block.begin)
        for done in range(drawn + 1, count + 1):
            number = numbers[done - 1]
            sample, block.samples[number] = block.samples[number], None
            assert sample is not None
            yield sample, Place(*block.begin, done, count) if done < count else Place(*following.begin)
            fill(following, min(done, size))
        block, drawn = following, 0
        fill(block, size)

"""`shuffled`: a shuffle buffer whose state is four numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from azure_torch_ckpt.datasets.epoch_state import StreamPosition
from azure_torch_ckpt.datasets.order import Permutation

__all__ = ["shuffled"]

_T = TypeVar("_T")
_Begin = tuple[int, int]


@dataclass(slots=True)
class _ShuffleBlock(Generic[_T]):
    """Samples that follow each other from `begin` on.

    Attributes:
        closed: no more samples will be added.
    """

    begin: _Begin
    samples: list[_T | None] = field(default_factory=list)
    closed: bool = False


def shuffled(
    source: Iterator[tuple[_T | None, _Begin]],
    size: int,
    place: StreamPosition,
    order: Callable[[int, _Begin], Permutation | range],
) -> Iterator[tuple[_T, StreamPosition]]:
    """Shuffle a stream in blocks of `size` samples: for each sample drawn from a block, one is added to the next block.

    So `size` samples are held at any time, the first one is yielded when so many have been read, and none moves by more
    than that. In exchange, a pass is resumed exactly: from the beginning of its block, of which the first few samples
    are drawn already. At most twice `size` samples are read again for that, and the state holds none.

    Args:
        source: samples from `place` on, each with the position and offset behind it; None in place of samples that are
            left out. A None ends a block, so that a block that is read again has the same samples, even if the missing
            ones can be read then.
        place: where to continue.
        order: returns a permutation of a number of samples, for a block that begins at a position.

    Yields:
        samples, each with the place at which to continue after it.
    """
    reached = place[:2]

    def fill(block: _ShuffleBlock[_T], count: int) -> None:
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

    block = _ShuffleBlock[_T](reached)
    drawn = place.drawn
    fill(block, place.block if drawn else size)
    while block.samples:
        following = _ShuffleBlock[_T](reached)
        count = len(block.samples)
        numbers = order(count, block.begin)
        for done in range(drawn + 1, count + 1):
            number = numbers[done - 1]
            sample, block.samples[number] = block.samples[number], None
            assert sample is not None
            yield (
                sample,
                StreamPosition(*block.begin, done, count) if done < count else StreamPosition(*following.begin),
            )
            fill(following, min(done, size))
        block, drawn = following, 0
        fill(block, size)

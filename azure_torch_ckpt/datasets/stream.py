"""What is read from its beginning to its end: the base of `IterableBlobDataset` and `TarDataset`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, TypeVar

from torch.utils.data import IterableDataset

from azure_torch_ckpt.datasets.listing import BlobListing
from azure_torch_ckpt.datasets.progress import Cursor, Plan, Progress
from azure_torch_ckpt.datasets.sources import FromListing

__all__ = ["Stream"]

_Input = TypeVar("_Input")
_T_co = TypeVar("_T_co", covariant=True)


class Stream(FromListing[_Input, _T_co], IterableDataset[_T_co]):
    """An iterable dataset that is sharded over ranks and workers, can be shuffled, and goes on where it was left."""

    def __init__(self, listing: BlobListing, plan: Plan) -> None:
        self.listing = listing
        self._progress = Progress(plan)

    def __iter__(self) -> Iterator[_T_co]:
        # Not a generator itself: what was loaded is for this pass, whenever its first sample is asked for.
        return self._read(self._progress.begin())

    @abstractmethod
    def _read(self, cursor: Cursor) -> Iterator[_T_co]:
        """The samples from the cursor on. It moves on before each is yielded, and not before an error."""

    def set_epoch(self, epoch: int) -> None:
        """Turn to an epoch, in this process and in all workers, those that persist, too. Call it before each pass.

        The epoch that was loaded goes on where the state was taken; any other begins at its beginning.
        """
        self._progress.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """How far this process has got.

        Raises:
            ValueError: workers read: they are ahead of the training, and nobody here knows how far that is.
        """
        return self._progress.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next pass go on where the state was taken.

        Raises:
            ValueError: the state is of another dataset or order, or of another number of workers or ranks that it
                depends on.
        """
        self._progress.load_state_dict(state_dict)

"""How far a save, a load or a copy has got: tqdm bars and callbacks.

AzureBlobWriter(url, progress=True)                  # a tqdm bar on rank 0
AzureBlobWriter(url, progress=lambda p: print(p.done, p.total))
AzureBlobWriter(url, progress=AllRanks(callback))    # called on every rank
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from azure_torch_ckpt.errors import MissingDependencyError

__all__ = ["AllRanks", "Meter", "Progress", "ProgressOption", "TqdmBar", "check_progress"]

_log = logging.getLogger(__name__)

# Ten reports a second look smooth; the callback's time is a worker's.
_SECONDS_BETWEEN = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one rank has got.

    Attributes:
        operation: ``"save"`` or ``"load"``.
        url: the checkpoint's, without a SAS.
        rank: of ``torch.distributed`` (the whole job's); 0 without it.
        done: bytes that have arrived.
        total: bytes there will be, as far as is known (pickled objects are not counted before they are there); never
            less than `done`. None where nobody knows. In the last report of a success, equal to `done`.
        seconds: since the transfer began.
    """

    operation: str
    url: str
    rank: int
    done: int
    total: int | None
    seconds: float


Callback: TypeAlias = Callable[[Progress], object]


@dataclass(frozen=True, slots=True)
class AllRanks:
    """``progress=AllRanks(callback)``: call it on every rank, not on rank 0 alone."""

    callback: Callback


ProgressOption: TypeAlias = "bool | Callback | AllRanks | None"
"""What a user may pass as ``progress=``: None or False for nothing, True for a tqdm bar, or a callback."""


def check_progress(option: ProgressOption) -> None:
    """Refuse now what could not be used later.

    Raises:
        MissingDependencyError: True, and tqdm is not installed.
        TypeError: `option` is none of what ``progress=`` takes.
    """
    if option is True:
        _tqdm()
    elif option is not None and option is not False and not callable(option) and not isinstance(option, AllRanks):
        raise TypeError(f"progress= is None, True (a tqdm bar), a callback or AllRanks(callback), not {option!r}")


class Meter:
    """Counts the bytes of one transfer and reports them, ten times a second at most and one report at a time.

    A context manager: entering reports 0 bytes; leaving reports the end, unless there was an error, or `pause` was
    called and it is entered again later. A callback that raises is logged, once, and not called again: a broken display
    must not cost a checkpoint.

    Args:
        zero: what is reported first; its `total` is what is expected.
    """

    def __init__(self, option: ProgressOption, zero: Progress) -> None:
        self._zero = zero
        self._total = zero.total
        self._done = 0
        self._lock = threading.Lock()
        self._began = self._last = time.monotonic()
        self._reporting = False
        self._goes_on = False
        self._bar: TqdmBar | None = None
        self._callback = self._callback_of(option)

    def __enter__(self) -> Meter:
        self._report(self._done)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        goes_on, self._goes_on = self._goes_on, False
        if error is None and goes_on:
            return
        if error is None:
            self._total = self._done  # what was expected may have been a little off
            self._report(self._done)
        if self._bar is not None:
            self._bar.close()

    @property
    def done(self) -> int:
        """Bytes so far."""
        return self._done

    @property
    def reports(self) -> bool:
        """Whether anybody wants to know."""
        return self._callback is not None

    def pause(self) -> None:
        """When this is left for the next time, more will come: it is entered again."""
        self._goes_on = True

    def expect(self, nbytes: int) -> None:
        """Count on `nbytes` more."""
        with self._lock:
            self._total = (self._total or 0) + nbytes

    def moved(self, nbytes: int) -> None:
        """Count `nbytes` that have arrived. From any thread; at most one of them runs the callback."""
        with self._lock:
            self._done += nbytes
            done = self._done
            if self._callback is None or self._reporting or time.monotonic() - self._last < _SECONDS_BETWEEN:
                return
            self._reporting = True
        try:
            self._report(done)
        finally:
            self._last = time.monotonic()
            self._reporting = False

    def _report(self, done: int) -> None:
        if self._callback is None:
            return
        zero = self._zero
        total = None if self._total is None else max(self._total, done)
        seconds = time.monotonic() - self._began
        try:
            self._callback(Progress(zero.operation, zero.url, zero.rank, done, total, seconds))
        except Exception:
            self._callback = None
            _log.exception("the progress callback failed and is not called again; the %s goes on", zero.operation)

    def _callback_of(self, option: ProgressOption) -> Callback | None:
        if isinstance(option, AllRanks):
            return option.callback
        if option is None or option is False or self._zero.rank != 0:
            return None
        if option is not True:
            return option
        name = self._zero.url.rstrip("/").rpartition("/")[2]
        bar = self._bar = TqdmBar(f"{self._zero.operation} {name}")
        return lambda progress: bar(progress.done, progress.total)


class TqdmBar:
    """A tqdm bar of bytes, with rate and time left, that is called with the bytes done and the bytes in all.

        with TqdmBar("copy step-1000") as bar:
            copy(source, target, progress=bar)

    Raises:
        MissingDependencyError: tqdm is not installed.
    """

    def __init__(self, description: str) -> None:
        self._bar = _tqdm()(desc=description, unit="B", unit_scale=True, dynamic_ncols=True)

    def __enter__(self) -> TqdmBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, done: int, total: int | None) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        self._bar.close()


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise MissingDependencyError(
            "progress=True shows a tqdm bar, and tqdm is not installed. Install it (pip install tqdm), or pass a "
            "callback as progress="
        ) from error
    return tqdm

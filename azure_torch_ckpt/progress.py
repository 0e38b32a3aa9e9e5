"""``progress=``: how far a save, a load or a copy is, as a tqdm bar or by a callback.

AzureBlobWriter(url, progress=True)                  # a tqdm bar on rank 0
AzureBlobWriter(url, progress=lambda p: print(p.done, p.total))
AzureBlobWriter(url, progress=AllRanks(callback))    # called on every rank
catalog.copy(source, destination, progress=True)     # the catalog's functions take the same
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from azure_torch_ckpt.errors import MissingDependencyError

__all__ = ["AllRanks", "Meter", "Progress", "ProgressOption", "TqdmBar", "check_progress"]

_log = logging.getLogger(__name__)

# Ten reports a second look smooth. The callback runs on a worker thread, which moves no bytes meanwhile.
_SECONDS_BETWEEN = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of one rank's transfer.

    Attributes:
        operation: ``"save"`` or ``"load"``; of the catalog ``"copy"``, ``"consolidate"``, ``"diff"`` or ``"verify"``.
        url: URL of the checkpoint without a SAS. For a copy the source, which may be a local path.
        rank: rank in ``torch.distributed`` (in the whole job); 0 without it.
        done: bytes that have arrived.
        total: bytes expected so far, never less than `done`. A pickled object counts once it is pickled. None while
            the total is unknown. In the last report of a success, `total` equals `done`.
        seconds: time since the transfer began.
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
    """``progress=AllRanks(callback)`` calls `callback` on every rank instead of rank 0 alone."""

    callback: Callback


ProgressOption: TypeAlias = "bool | Callback | AllRanks | None"
"""Values of every ``progress=``: None or False for nothing, True for a tqdm bar, or a callback."""


def check_progress(option: ProgressOption) -> None:
    """Raise early if `option` cannot be used.

    Raises:
        MissingDependencyError: `option` is True, and tqdm is not installed.
        TypeError: `option` is not a `ProgressOption`, or a callback that cannot be called with one `Progress`.
    """
    if option is None or option is False:
        return
    if option is True:
        _tqdm()
        return
    callback = option.callback if isinstance(option, AllRanks) else option
    if not callable(callback):
        raise TypeError(f"progress= is None, True (a tqdm bar), a callback or AllRanks(callback), not {option!r}")
    try:
        inspect.signature(callback).bind(None)
    except ValueError:
        pass  # some built-in functions have no signature
    except TypeError as error:
        raise TypeError(f"The callback of progress= must take one argument, a Progress: {error}") from None


class Meter:
    """Counts the bytes of one transfer and reports them, ten times a second at most and one report at a time.

    A context manager: entering reports the bytes so far, leaving reports the end. After an error, and after `pause`,
    leaving reports nothing. If a callback raises, the error is logged once and the callback is not called again: a
    broken display must not cost a checkpoint.

    Args:
        option: ``progress=`` as the user gave it.
        zero: the first report; its `total` is the number of bytes expected.
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
            self._total = self._done  # the expected total may have been a little off
            self._report(self._done)
        if self._bar is not None:
            self._bar.close()

    @property
    def done(self) -> int:
        """Bytes that have arrived."""
        return self._done

    @property
    def reports(self) -> bool:
        """Whether this meter has a callback or a bar on this rank."""
        return self._callback is not None

    def pause(self) -> None:
        """Let the next exit report no end, because the meter will be entered again."""
        self._goes_on = True

    def expect(self, nbytes: int) -> None:
        """Add `nbytes` to the expected total."""
        with self._lock:
            self._total = (self._total or 0) + nbytes

    def moved(self, nbytes: int) -> None:
        """Count `nbytes` that have arrived. Thread-safe; one thread at a time runs the callback."""
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
            _log.exception("the progress callback failed and is not called again; the %s continues", zero.operation)

    def _callback_of(self, option: ProgressOption) -> Callback | None:
        if isinstance(option, AllRanks):
            return option.callback
        if option is None or option is False or self._zero.rank != 0:
            return None
        if option is not True:
            return option
        name = self._zero.url.rstrip("/").rpartition("/")[2]
        self._bar = TqdmBar(f"{self._zero.operation} {name}")
        return self._bar


class TqdmBar:
    """A tqdm bar of bytes, with rate and time left: a callback for ``progress=`` with a description of its own.

        with TqdmBar("nightly copy") as bar:
            copy(source, destination, progress=bar)

    Raises:
        MissingDependencyError: tqdm is not installed.
    """

    def __init__(self, description: str) -> None:
        self._bar = _tqdm()(desc=description, unit="B", unit_scale=True, dynamic_ncols=True)

    def __enter__(self) -> TqdmBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, done: int | Progress, total: int | None = None) -> None:
        """Show a `Progress`, or a number of bytes done and a total."""
        if isinstance(done, Progress):
            total, done = done.total, done.done
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        self._bar.refresh()

    def close(self) -> None:
        """End the bar's line; what it shows stays."""
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

"""The file that ``torch.save`` writes, as bytes around the memory of its tensors; and reading such a file with torch.

``torch.save`` writes a zip file of stored (uncompressed) records: a pickle that names dtype, shape and strides of each
tensor, some marks, the bytes of each tensor as a record ``data/<n>``, the directory. All but the bytes of the tensors
follows from dtypes and shapes, so torch is asked to leave these bytes out (``torch.serialization.skip_data``), and the
holes in its file are where they go. Then torch leaves their CRC32 0, and ``torch.load`` does not look at it. Other zip
tools do, and complain about these records.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import math
import pickle
import struct
import threading
import types
import warnings
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

import torch

from azure_torch_ckpt.dcp.tensors.memory import address_of, memory
from azure_torch_ckpt.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Envelope", "Outline", "Placeholders", "envelope", "load_saved", "load_tensor", "outline", "serialize"]

_LOCAL_HEADER = struct.Struct("<26x2H")  # of a zip record; the last two fields are the lengths of name and extra field
_JOIN_BELOW = 64 * 1024  # bytes; a smaller view costs more as a view of its own than as a copy


# One tensor


@dataclass(frozen=True, slots=True)
class Envelope:
    """``head + payload + trailer`` is what ``torch.load(..., weights_only=True)`` reads as a contiguous CPU tensor."""

    head: bytes
    trailer: bytes


@functools.lru_cache(maxsize=4096)
def envelope(dtype: torch.dtype, shape: tuple[int, ...]) -> Envelope:
    """Make the envelope of a contiguous tensor of this dtype and shape (a ``torch.Size`` will do).

    Takes no memory for the payload, and about a millisecond the first time. The file is as long as the one that
    ``torch.save`` writes for the tensor by default, without ``requires_grad``. It differs only in the payload's CRC32
    and in torch's "serialization id", a hash of all CRC32s, which ``torch.load`` does not look at either.

    ``torch.utils.serialization.config`` and the caller's modes have no influence.

    Raises:
        CheckpointError: ``torch.save`` refuses the dtype, or this version of torch writes something else than described
            above. `serialize` makes no such assumption.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    try:
        file, _ = _save_without_data(lambda: Placeholders(1).make("", dtype, shape))
        start, length = _payload_record(file)
    except Exception as error:
        raise _unexpected(dtype, shape, f"{type(error).__name__}: {error}") from error
    if length != nbytes or (nbytes and file.holes != [(start, nbytes)]):
        raise _unexpected(dtype, shape, f"payload of {nbytes} bytes, record of {length} at {start}, holes {file.holes}")
    return Envelope(file.read_range(0, start), file.read_range(start + nbytes, file.size))


def _payload_record(file: _FileWithHoles) -> tuple[int, int]:
    """Where in the zip file the bytes of its only tensor start, and how many there are."""
    with zipfile.ZipFile(cast("IO[bytes]", file)) as archive:
        (record,) = (info for info in archive.infolist() if info.filename.endswith("/data/0"))
    if record.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{record.filename} is compressed")
    header = file.read_range(record.header_offset, record.header_offset + _LOCAL_HEADER.size)
    name_length, extra_length = _LOCAL_HEADER.unpack(header)
    return record.header_offset + _LOCAL_HEADER.size + name_length + extra_length, record.file_size


def _unexpected(dtype: torch.dtype, shape: tuple[int, ...], what: str) -> CheckpointError:
    return CheckpointError(
        f"torch.save of torch {torch.__version__} did not write a tensor of {dtype} and shape {tuple(shape)} in the "
        f"form that this package knows ({what}). If this version can save such a tensor at all, please report it."
    )


# A state dict


@dataclass(frozen=True, slots=True)
class Outline:
    """A file of ``torch.save`` in the order of its bytes.

    Attributes:
        parts: bytes as they are, the key of a tensor whose bytes belong here, or a tensor in memory.
        size: bytes of the whole file.
    """

    parts: list[bytes | str | torch.Tensor]
    size: int


class Placeholders:
    """CPU tensors that claim memory which is not there, each with an address of its own that stands for its key.

    A fake tensor would do as well, but the first `FakeTensorMode` of a process costs it a second of imports.

    Args:
        count: how many there will be at most.
    """

    def __init__(self, count: int) -> None:
        self._addresses = (ctypes.c_ubyte * max(count, 1))()
        self.keys: dict[int, str] = {}  # by address

    def make(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        address = ctypes.addressof(self._addresses) + len(self.keys)
        self.keys[address] = key
        storage = torch.frombuffer(memory(address, nbytes, self._addresses), dtype=torch.uint8).untyped_storage()
        stride = torch.empty(shape, device="meta").stride()
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)


def outline(state: Mapping[Any, Any], placeholders: Placeholders) -> Outline:
    """Make what ``torch.save(state, file)`` writes, except for the bytes of tensors.

    Raises:
        CheckpointError: this version of torch writes something else.
        Exception: whatever ``torch.save`` raises for an object in `state`.
    """
    file, storages = _save_without_data(lambda: state)
    if [length for _, length in file.holes] != [storage.nbytes() for storage in storages]:
        raise CheckpointError(
            f"torch.save of torch {torch.__version__} does not write tensors in the form that this package knows "
            f"({len(file.holes)} holes for {len(storages)} tensors). Please report it"
        )
    parts: list[bytes | str | torch.Tensor] = []
    for data, storage in zip(file.parts, [*storages, None], strict=True):
        parts.append(bytes(data))
        if storage is None:
            break
        key = placeholders.keys.get(storage.data_ptr())
        parts.append(torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage) if key is None else key)
    return Outline(parts, file.size)


# The file with holes


def _save_without_data(make: Callable[[], object]) -> tuple[_FileWithHoles, list[torch.UntypedStorage]]:
    """``torch.save(make(), file)`` without the bytes of tensors: the file, and the storages of its holes in order."""
    saved: Future[tuple[_FileWithHoles, list[torch.UntypedStorage]]] = Future()

    def save() -> None:
        try:
            file = _FileWithHoles()
            storages: dict[int, torch.UntypedStorage] = {}  # by address, in the order in which torch.save meets them

            def note(tensor: torch.Tensor) -> None:
                storage = tensor.untyped_storage()
                if storage.nbytes():
                    storages.setdefault(storage.data_ptr(), storage)

            with torch.serialization.skip_data():
                _torch_save(make(), file, note)
            file.end_hole()
            saved.set_result((file, list(storages.values())))
        except BaseException as error:
            saved.set_exception(error)

    # In a thread of its own none of the caller's modes is active: no default device, no fake tensors, no dispatch mode
    # that looks at every result, which a placeholder would not survive. Nor are the caller's settings of torch: 2.13
    # has them per thread. Where a version has them per process, `storage_alignment` pads the head, and the head says
    # so. A bare thread, because executors refuse work once the main thread has ended, and a save may still run then.
    threading.Thread(target=save, daemon=True).start()
    return saved.result()


class _FileWithHoles:
    """A file in memory that keeps what is written and not what is skipped.

    Attributes:
        parts: what was written, one part more than there are holes.
        holes: start and length of each.
    """

    def __init__(self) -> None:
        self.parts = [bytearray()]
        self.holes: list[tuple[int, int]] = []
        self.size = 0
        self._position = 0

    def write(self, data: Buffer) -> int:
        self.end_hole()
        before = len(self.parts[-1])
        self.parts[-1] += data
        written = len(self.parts[-1]) - before
        self._position = self.size = self.size + written
        return written

    def end_hole(self) -> None:
        """Make what was skipped up to here a hole."""
        if self._position < self.size:
            raise io.UnsupportedOperation(f"write at {self._position} of {self.size}")
        if self._position > self.size:
            self.holes.append((self.size, self._position - self.size))
            self.parts.append(bytearray())
            self.size = self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        pass

    def read(self, size: int | None = -1) -> bytes:
        stop = self.size if size is None or size < 0 else min(self._position + size, self.size)
        data = self.read_range(self._position, stop)
        self._position = stop
        return data

    def read_range(self, start: int, stop: int) -> bytes:
        first = 0
        for part, (hole, length) in zip(self.parts, [*self.holes, (self.size, 0)], strict=True):
            if first <= start and stop <= hole:
                return bytes(part[start - first : stop - first])
            first = hole + length
        raise io.UnsupportedOperation(f"read of {start} to {stop}, holes {self.holes}")


def _torch_save(obj: object, file: object, note: Callable[[torch.Tensor], None]) -> None:
    """``torch.save``; `note` gets every tensor that it meets, also those within subclasses or made for the pickle."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, part: object) -> Any:
            if isinstance(part, torch.Tensor):
                note(part)
            return NotImplemented

    module = types.SimpleNamespace(__name__="pickle", Pickler=Pickler)
    torch.save(obj, cast("IO[bytes]", file), pickle_module=module)


# Anything


def serialize(obj: object) -> list[memoryview]:
    """``torch.save`` of anything, as views to be sent one after the other: for what `is_plain` refuses.

    The views of large CPU tensors are of their own memory, which the views keep allocated. So a tensor that is changed
    before the views are sent changes what is sent. All else is copied: the pickle, and the bytes of tensors of other
    devices.

    Raises:
        Exception: whatever ``torch.save`` raises for `obj`.
    """
    stream = _ViewStream()
    _torch_save(obj, stream, stream.keep)
    return stream.views()


class _ViewStream:
    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}  # by address
        self._views: list[memoryview] = []
        self._copied = bytearray()

    def keep(self, tensor: torch.Tensor) -> None:
        """From now on a view may be of this tensor's memory."""
        # A wrapper without a storage raises one error or another. Then what is written of it is copied.
        with contextlib.suppress(Exception):
            storage = tensor.untyped_storage()
            if storage.device.type == "cpu":
                self._storages[storage.data_ptr()] = storage

    def write(self, data: memoryview) -> int:
        # torch hands over its memory without an owner, valid during this call only.
        if len(data) >= _JOIN_BELOW:
            address = address_of(data)
            storage = self._storages.get(address)
            if storage is not None and len(data) <= storage.nbytes():
                self._end_copied()
                self._views.append(memory(address, len(data), storage).toreadonly())
                return len(data)
        self._copied += data
        return len(data)

    def flush(self) -> None:
        pass

    def views(self) -> list[memoryview]:
        self._end_copied()
        return self._views

    def _end_copied(self) -> None:
        if self._copied:
            self._views.append(memoryview(self._copied).toreadonly())
            self._copied = bytearray()


# Reading


def load_saved(stream: IO[bytes], what: str, advice: str = "") -> object:
    """Load what ``torch.save`` wrote, on the CPU and without running anything that it names.

    Args:
        what: names it in messages.
        advice: what else can be done about a class that torch refuses; begins with ", or ".

    Raises:
        UnsupportedCheckpointError: it has a class that torch does not load unless it is declared safe.
        CorruptCheckpointError: ``torch.load`` cannot read the bytes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of typed storages and experimental dtypes: the save has warned of them
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(stream):  # garbage in the form of torch's first files
            raise _unreadable(what, error) from error
        raise UnsupportedCheckpointError(
            f"{what} has a class that torch.load considers unsafe ({_unsafe_names(stream) or error}). If you trust the "
            f"checkpoint, name the class with torch.serialization.add_safe_globals first{advice}"
        ) from error
    except Exception as error:
        raise _unreadable(what, error) from error


def _unsafe_names(stream: IO[bytes]) -> str:
    stream.seek(0)
    try:
        return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(stream)))
    except Exception:  # of an opcode that torch does not know
        return ""


def _unreadable(what: str, error: Exception) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"torch.load cannot read {what}: {error}")


def load_tensor(stream: IO[bytes], what: str) -> torch.Tensor:
    """`load_saved` of a tensor; `CorruptCheckpointError` for anything else."""
    tensor = load_saved(stream, what)
    if not isinstance(tensor, torch.Tensor):
        raise CorruptCheckpointError(f"{what} holds {type(tensor).__name__}, not a tensor")
    return tensor

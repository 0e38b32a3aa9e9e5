"""The bytes that ``torch.save`` puts around a tensor's payload.

``torch.save`` writes a zip file of stored (uncompressed) records: a pickle that names dtype, shape and strides, some
marks, the tensor's bytes as the record ``data/0``, the directory. All but the payload follows from dtype and shape, so
it is made once per pair and kept.
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
import zipfile
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

import torch

from azure_torch_ckpt.dcp.tensors.memory import address_of, memory
from azure_torch_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Envelope", "envelope", "serialize"]

_LOCAL_HEADER = struct.Struct("<26x2H")  # of a zip record; the last two fields are the lengths of name and extra field
_JOIN_BELOW = 64 * 1024  # bytes; a smaller piece costs more as a piece of its own than as a copy


@dataclass(frozen=True, slots=True)
class Envelope:
    """``head + payload + trailer`` is what ``torch.load(..., weights_only=True)`` reads as a contiguous CPU tensor."""

    head: bytes
    trailer: bytes


@functools.lru_cache(maxsize=4096)
def envelope(dtype: torch.dtype, shape: tuple[int, ...]) -> Envelope:
    """The envelope for a contiguous tensor of this dtype and shape (a ``torch.Size`` will do), ``requires_grad`` off.

    Takes no memory for the payload, and about a millisecond the first time. The file is as long as the one that
    ``torch.save`` writes for the tensor by default, and differs from it only in the payload's CRC32 (0 here) and in
    torch's "serialization id", a hash of all CRC32s. ``torch.load`` looks at neither. Other zip tools do compare the
    CRC32, and will complain about this record.

    ``torch.utils.serialization.config`` and the caller's modes have no influence.

    Raises:
        CheckpointError: ``torch.save`` refuses the dtype, or this version of torch writes something else than described
            above. `serialize` makes no such assumption.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    saved: Future[_FileWithHole] = Future()
    # In a thread of its own none of the caller's modes is active: no default device, no fake tensors, no dispatch mode
    # that looks at every result, which this tensor would not survive. Nor are the caller's settings of torch: 2.13 has
    # them per thread. Where a version has them per process, `storage_alignment` pads the head, and the head says so.
    # A bare thread, because executors refuse work once the main thread has ended, and a save may still run then.
    threading.Thread(target=_save_without_payload, args=(dtype, shape, nbytes, saved), daemon=True).start()
    try:
        file = saved.result()
        start, length = _payload_record(file)
    except Exception as error:
        raise _unexpected(dtype, shape, f"{type(error).__name__}: {error}") from error
    if length != nbytes or (nbytes and file.hole != (start, nbytes)):
        raise _unexpected(dtype, shape, f"payload of {nbytes} bytes, record of {length} at {start}, hole {file.hole}")
    return Envelope(file.read_range(0, start), file.read_range(start + nbytes, file.size))


def _save_without_payload(
    dtype: torch.dtype, shape: tuple[int, ...], nbytes: int, saved: Future[_FileWithHole]
) -> None:
    try:
        file = _FileWithHole()
        with torch.serialization.skip_data():
            torch.save(_tensor_without_memory(dtype, shape, nbytes), cast("IO[bytes]", file))
        saved.set_result(file)
    except BaseException as error:
        saved.set_exception(error)


def _tensor_without_memory(dtype: torch.dtype, shape: tuple[int, ...], nbytes: int) -> torch.Tensor:
    """A CPU tensor that claims ``nbytes`` at an address where there is one.

    A fake tensor would do as well, but the first `FakeTensorMode` of a process costs it a second of imports.
    """
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    byte = ctypes.c_ubyte()
    claimed = memory(ctypes.addressof(byte), nbytes, byte)
    stride = torch.empty(shape, device="meta").stride()
    storage = torch.frombuffer(claimed, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)


def _payload_record(file: _FileWithHole) -> tuple[int, int]:
    """Where in the zip file the payload's bytes start, and how many there are."""
    with zipfile.ZipFile(file) as archive:
        (record,) = (info for info in archive.infolist() if info.filename.endswith("/data/0"))
    if record.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{record.filename} is compressed")
    header = file.read_range(record.header_offset, record.header_offset + _LOCAL_HEADER.size)
    name_length, extra_length = _LOCAL_HEADER.unpack(header)
    return record.header_offset + _LOCAL_HEADER.size + name_length + extra_length, record.file_size


class _FileWithHole:
    """A file in memory that keeps what is written and not what is skipped. One stretch may be skipped."""

    def __init__(self) -> None:
        self.hole: tuple[int, int] | None = None  # start, length
        self.size = 0
        self._before = bytearray()
        self._after = bytearray()
        self._position = 0

    def write(self, data: Buffer) -> int:
        if self._position != self.size:
            if self._position < self.size or self.hole is not None:
                raise io.UnsupportedOperation(f"write at {self._position} of {self.size}, hole {self.hole}")
            self.hole = (self.size, self._position - self.size)
        part = self._before if self.hole is None else self._after
        before = len(part)
        part += data
        written = len(part) - before
        self._position = self.size = self._position + written
        return written

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
        hole_start, hole_length = self.hole or (self.size, 0)
        hole_stop = hole_start + hole_length
        if stop <= hole_start:
            return bytes(self._before[start:stop])
        if start >= hole_stop:
            return bytes(self._after[start - hole_stop : stop - hole_stop])
        raise io.UnsupportedOperation(f"read of {start} to {stop}, hole {self.hole}")


def _unexpected(dtype: torch.dtype, shape: tuple[int, ...], what: str) -> CheckpointError:
    return CheckpointError(
        f"torch.save of torch {torch.__version__} did not write a tensor of {dtype} and shape {tuple(shape)} in the "
        f"form that this package knows ({what}). If this version can save such a tensor at all, please report it."
    )


def serialize(obj: object) -> list[memoryview]:
    """``torch.save`` of anything, as pieces to be sent one after the other: for what `payload.is_plain` refuses.

    The memory of CPU tensors is in the pieces themselves, not copied, and the pieces keep it allocated. So whoever
    changes such a tensor before the pieces are sent changes what is sent. All else is copied: the pickle, and the bytes
    of tensors of other devices.

    Raises:
        whatever ``torch.save`` raises for ``obj``.
    """
    stream = _PieceStream()

    class Pickler(pickle.Pickler):
        # Sees every tensor that torch.save meets, also those inside of subclasses and those made to be pickled.
        def reducer_override(self, part: object) -> Any:
            if isinstance(part, torch.Tensor):
                stream.keep(part)
            return NotImplemented

    torch.save(obj, cast("IO[bytes]", stream), pickle_module=types.SimpleNamespace(__name__="pickle", Pickler=Pickler))
    return stream.pieces()


class _PieceStream:
    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}  # by address
        self._pieces: list[memoryview] = []
        self._copied = bytearray()

    def keep(self, tensor: torch.Tensor) -> None:
        """From now on this tensor's memory may be a piece."""
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
                self._pieces.append(memory(address, len(data), storage).toreadonly())
                return len(data)
        self._copied += data
        return len(data)

    def flush(self) -> None:
        pass

    def pieces(self) -> list[memoryview]:
        self._end_copied()
        return self._pieces

    def _end_copied(self) -> None:
        if self._copied:
            self._pieces.append(memoryview(self._copied).toreadonly())
            self._copied = bytearray()

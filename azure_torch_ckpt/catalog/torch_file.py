"""The file that ``torch.save`` writes for a state dict, with holes where the bytes of its tensors go."""

from __future__ import annotations

import ctypes
import io
import pickle
import threading
import types
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

import torch

from azure_torch_ckpt.dcp.tensors.memory import memory
from azure_torch_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Outline", "Placeholders", "outline"]


@dataclass(frozen=True, slots=True)
class Outline:
    """The file in order: bytes as they are, the key of a tensor whose bytes belong here, or a tensor in memory.

    Attributes:
        size: bytes of the whole file.
    """

    pieces: list[bytes | str | torch.Tensor]
    size: int


class Placeholders:
    """CPU tensors that claim memory which is not there, each with an address of its own by which it is known again."""

    def __init__(self, count: int) -> None:
        self._addresses = (ctypes.c_ubyte * max(count, 1))()
        self.keys: dict[int, str] = {}  # by address

    def make(self, key: str, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        nbytes = shape.numel() * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        address = ctypes.addressof(self._addresses) + len(self.keys)
        self.keys[address] = key
        storage = torch.frombuffer(memory(address, nbytes, self._addresses), dtype=torch.uint8).untyped_storage()
        stride = torch.empty(shape, device="meta").stride()
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)


def outline(state: Mapping[Any, Any], placeholders: Placeholders) -> Outline:
    """What ``torch.save(state, file)`` writes, except for the bytes of tensors.

    As `envelope` says, torch then leaves the CRC32 of these bytes 0, which ``torch.load`` does not look at.

    Raises:
        CheckpointError: this version of torch writes something else.
        whatever ``torch.save`` raises for an object in `state`.
    """
    saved: Future[tuple[_FileWithHoles, list[torch.UntypedStorage]]] = Future()
    # Without the caller's modes and settings of torch; see envelope.py.
    threading.Thread(target=_save, args=(state, saved), daemon=True).start()
    file, storages = saved.result()
    if [length for _, length in file.holes] != [storage.nbytes() for storage in storages]:
        raise CheckpointError(
            f"torch.save of torch {torch.__version__} does not write tensors in the form that this package knows "
            f"({len(file.holes)} holes for {len(storages)} tensors). Please report it"
        )
    pieces: list[bytes | str | torch.Tensor] = []
    for data, storage in zip(file.parts, [*storages, None], strict=True):
        pieces.append(bytes(data))
        if storage is None:
            break
        key = placeholders.keys.get(storage.data_ptr())
        pieces.append(torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage) if key is None else key)
    return Outline(pieces, file.size)


def _save(state: Mapping[Any, Any], saved: Future[tuple[_FileWithHoles, list[torch.UntypedStorage]]]) -> None:
    try:
        file = _FileWithHoles()
        storages: dict[int, torch.UntypedStorage] = {}  # by address, in the order in which torch.save meets them

        class Pickler(pickle.Pickler):
            def reducer_override(self, part: object) -> Any:
                if isinstance(part, torch.Tensor):
                    storage = part.untyped_storage()
                    if storage.nbytes():
                        storages.setdefault(storage.data_ptr(), storage)
                return NotImplemented

        with torch.serialization.skip_data():
            module = types.SimpleNamespace(__name__="pickle", Pickler=Pickler)
            torch.save(state, cast("IO[bytes]", file), pickle_module=module)
        file.end()
        saved.set_result((file, list(storages.values())))
    except BaseException as error:
        saved.set_exception(error)


class _FileWithHoles:
    """A file in memory that keeps what is written and not what is skipped: one part more than there are holes."""

    def __init__(self) -> None:
        self.parts = [bytearray()]
        self.holes: list[tuple[int, int]] = []  # start, length
        self.size = 0
        self._position = 0

    def write(self, data: Buffer) -> int:
        self.end()
        before = len(self.parts[-1])
        self.parts[-1] += data
        written = len(self.parts[-1]) - before
        self._position = self.size = self.size + written
        return written

    def end(self) -> None:
        """What was skipped up to here is a hole."""
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

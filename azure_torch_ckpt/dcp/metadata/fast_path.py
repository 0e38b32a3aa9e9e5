"""`FastPath`: takes the entries that a ``.metadata`` repeats for every tensor and chunk, many opcodes at a time.

The machine in ``unpickler.py`` goes opcode by opcode, which at a million chunks takes longer than to fetch them. What
picklers of protocol 4 and 5 write for one more chunk, tensor or stored item differs from the one before in a few
strings and numbers alone. Those runs of opcodes are recognised here as bytes, and what they would have made is made at
once.

A run is taken only if it is, to the byte, opcodes whose effects are known, and all that they refer to has been checked.
Stack, marks and memo are then as those opcodes would have left them. In any doubt nothing is taken, and the machine
goes on as if this module did not exist.

A run that was taken once may be taken again by comparing bytes: the memo only ever grows, so a reference means the same
for the rest of the data, and what is shared between the objects made (names, numbers, sizes, dtypes) is immutable.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from azure_torch_ckpt._internal.torch_private import MemoryFormatEncoding, StorageInfo
from azure_torch_ckpt.dcp.metadata.vocabulary import KNOWN, STATE_CLASSES, TENSOR_PROPERTIES, Known

__all__ = ["REMEMBERED", "FastPath"]

# A run, or the text in it, that is longer is left to the machine; so no search goes far.
_LONGEST = 512
# Shapes recur; where each is new, it is useless to remember them all.
REMEMBERED = 65536

# In the patterns, R is a reference to the memo, I a natural number or one that needs more than 32 bits, D a tuple of
# those, S a torch.Size, T a short text that is put into the memo, or a reference to one, and O what makes a bare
# instance and begins its state. \x81 is NEWOBJ, \x85 to \x87 are TUPLE1 to TUPLE3, \x88 and \x89 NEWTRUE and NEWFALSE,
# \x8a LONG1, \x8c SHORT_BINUNICODE, \x94 MEMOIZE.
_PARTS = {
    b"R": rb"(?:h.|j.{4})",
    b"I": rb"(?:K.|M..|J...[\x00-\x7f]|\x8a(?:\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}|\x09.{9}))",
    b"D": rb"(?:\)|<I>(?:<I>(?:<I>)?)?[\x85-\x87]\x94|\((?:<I>){4,64}t\x94)",
    b"S": rb"(?:<R>(?:<D>\x85\x94R\x94)?)",
    b"T": rb"(?:\x8c.[^\x94]{0,255}\x94|<R>)",
    b"O": rb"<R>\)\x81\x94}\x94\(<R>",
}


def _pattern(source: bytes) -> re.Pattern[bytes]:
    while b"<" in source:
        source = re.sub(rb"<(\w)>", lambda match: _PARTS[match[1]], source)
    return re.compile(source, re.DOTALL)


# From the instance to its empty list of chunks: properties, size. Properties have strides since torch 2.15.
_HEAD = _pattern(
    rb"(<R>)\)\x81\x94}\x94\((<R>)(<R>)\)\x81\x94\((<R>)(<R>)([\x88\x89])(<R>)([\x88\x89])(<R>|<D>|N)?t\x94b"
    rb"(<R>)(<S>)(<R>)\]\x94"
)
_HEAD_END = b"]\x94"
_CHUNK = _pattern(rb"(<R>)\)\x81\x94}\x94\((<R>)(<S>)(<R>)(<S>)ub")
_CHUNK_END = b"ub"
_ONE_CHUNK_END = b"aub"
# A MetadataIndex: its name, hint and offset; then a _StorageInfo: its path, offset, and up to three more numbers.
_ITEM = _pattern(rb"(<O>)(<T>)(<R>)(<I>|N)(?:(<R>)(<S>|N))?ub(<O>)(<T>)(<R>)(<I>)(<R>(?:<I><R>(?:<I><R>)?)?)(<I>)ub")
_BEGIN = _pattern(rb"(<R>)\)\x81\x94}\x94\((<R>)")
_NUMBERED = _pattern(rb"(<R>)(<I>)?")
_NUMBERS = _pattern(rb"<I>")

_bare = object.__new__
_NO_SIZE: tuple[None, tuple[Any, ...]] = (None, ())
_SIZE = KNOWN["torch", "Size"]
_NONE = pickle.NONE
_SHORT_TEXT = pickle.SHORT_BINUNICODE[0]
_GET = pickle.BINGET[0]
_LONG_GET = pickle.LONG_BINGET[0]
_GETS = (_GET, _LONG_GET)
_MEMOIZE = pickle.MEMOIZE[0]
_MARK = pickle.MARK[0]
_TRUE = pickle.NEWTRUE
_LONG = pickle.LONG1[0]

# Errors of data in a run that looks right. The machine meets them again and reports them.
_DOUBTS = (IndexError, TypeError, ValueError, OverflowError, RuntimeError)

# Classes of a newer torch may take their state in another way.
_AS_KNOWN = not any(
    STATE_CLASSES[cls] for cls in (ChunkStorageMetadata, MetadataIndex, StorageInfo, TensorStorageMetadata)
)

_Value = TypeVar("_Value")
_Chunk = tuple[int, torch.Size, torch.Size, tuple[Any, ...]]
_Head = tuple[int, dict[str, Any], tuple[Any, ...], torch.Size, tuple[Any, ...]]


class FastPath:
    """Takes runs of opcodes behind a complete object of the same kind.

    Args:
        data: the pickle.
        stack, marks, memo: the machine's own, which it only ever changes in place.
    """

    def __init__(self, data: bytes, stack: list[Any], marks: list[int], memo: list[Any]) -> None:
        self._data = data
        self._stack = stack
        self._marks = marks
        self._memo = memo
        # Runs that were checked, each with what it makes.
        self._chunk_runs: dict[bytes, _Chunk] = {}
        self._head_runs: dict[bytes, _Head] = {}
        self._size_runs: dict[bytes, tuple[torch.Size, tuple[Any, ...]]] = {}
        self._path_runs: dict[bytes, str] = {}
        self._number_runs: dict[bytes, tuple[dict[str, int], str]] = {}
        # References that were checked: to a class and the fields that are named beside it.
        self._chunk_names: set[tuple[bytes, ...]] = set()
        self._item_names: set[tuple[bytes | None, ...]] = set()

    def after(self) -> dict[type[Any], Callable[[int], int]]:
        """Return what takes the entries behind an object that has just got its state, by the object's class.

        Each is called with the position behind the object, and returns the position of the first opcode that it did not
        take. They are not kept here: in a cycle, all that the machine has made would stay until the collector runs.
        """
        if not _AS_KNOWN:
            return {}
        return {
            ChunkStorageMetadata: self._take_chunks,
            StorageInfo: self._take_items,
            TensorStorageMetadata: self._take_tensors,
        }

    # Entries. Nothing is changed before all of an entry has been checked.

    def _take_chunks(self, pos: int) -> int:
        push, memo = self._stack.append, self._memo
        while (found := self._chunk(pos)) is not None:
            length, offsets, sizes, kept = found
            chunk = _bare(ChunkStorageMetadata)
            chunk.offsets = offsets
            chunk.sizes = sizes
            memo.append(chunk)
            memo.append({"offsets": offsets, "sizes": sizes})
            memo += kept
            push(chunk)
            pos += length
        return pos

    def _take_tensors(self, pos: int) -> int:
        data, stack, memo, runs = self._data, self._stack, self._memo, self._head_runs
        try:
            while True:
                op = data[pos]
                if op == _SHORT_TEXT:
                    start = pos + 3 + data[pos + 1]
                    name = str(data[pos + 2 : start - 1], "utf-8", "surrogatepass")
                    if data[start - 1] != _MEMOIZE:
                        return pos
                elif op == _GET:
                    start = pos + 2
                    name = memo[data[pos + 1]]
                elif op == _LONG_GET:
                    start = pos + 5
                    name = memo[int.from_bytes(data[pos + 1 : start], "little")]
                else:
                    return pos
                end = data.find(_HEAD_END, start, start + _LONGEST) + len(_HEAD_END)
                head = runs.get(data[start:end]) or self._head(start)
                if head is None:
                    return pos
                length, fields, state_kept, size, kept = head
                end = start + length
                several = data[end] == _MARK
                if not several:
                    found = self._chunk(end)
                    if found is None:
                        return pos
                    length, offsets, sizes, chunk_kept = found
                    end += length
                    if not data.startswith(_ONE_CHUNK_END, end):
                        return pos

                tensor = _bare(TensorStorageMetadata)
                properties = _bare(TensorProperties)
                properties.__dict__.update(fields)
                chunks: list[ChunkStorageMetadata] = []
                state: dict[str, Any] = {}
                if op == _SHORT_TEXT:
                    memo.append(name)
                memo += (tensor, state, properties)
                memo += state_kept
                memo += kept
                memo.append(chunks)
                if several:
                    stack += (name, tensor, state)
                    self._marks.append(len(stack))
                    stack += ("properties", properties, "size", size, "chunks", chunks)
                    self._marks.append(len(stack))
                    return self._take_chunks(end + 1)
                chunk = _bare(ChunkStorageMetadata)
                chunk.offsets = offsets
                chunk.sizes = sizes
                chunks.append(chunk)
                memo.append(chunk)
                memo.append({"offsets": offsets, "sizes": sizes})
                memo += chunk_kept
                state["properties"] = tensor.properties = properties
                state["size"] = tensor.size = size
                state["chunks"] = tensor.chunks = chunks
                stack += (name, tensor)
                pos = end + len(_ONE_CHUNK_END)
        except _DOUBTS:
            return pos

    def _take_items(self, pos: int) -> int:
        stack, memo, match = self._stack, self._memo, _ITEM.match
        sizes, paths, number_runs, known = self._size_runs, self._path_runs, self._number_runs, self._item_names
        names = None
        try:
            while (found := match(self._data, pos)) is not None:
                (
                    index_begins, name_run, hint_name, hint, offset_name, offset_run,
                    info_begins, path_run, start_name, start, numbers_run, last,
                ) = found.groups()  # fmt: skip
                before, names = names, (index_begins, hint_name, offset_name, info_begins, start_name)
                if names != before and names not in known:
                    self._check_item(*names)
                name = self._text(name_run)
                path = paths.get(path_run) or _remember(paths, path_run, self._text(path_run))
                numbers, last_name = number_runs.get(numbers_run) or self._numbers(numbers_run)
                info_state = {"relative_path": path, "offset": _number(start), **numbers, last_name: _number(last)}
                index_state: dict[str, Any] = {"fqn": name, "index": None if hint == _NONE else _number(hint)}
                kept: tuple[Any, ...] = ()
                if offset_run is not None:
                    offset, kept = _NO_SIZE if offset_run == _NONE else sizes.get(offset_run) or self._size(offset_run)
                    index_state["offset"] = offset

                index = _bare(MetadataIndex)
                index.__dict__.update(index_state)
                info = _bare(StorageInfo)
                info.__dict__.update(info_state)
                memo.append(index)
                memo.append(index_state)
                if name_run[0] == _SHORT_TEXT:
                    memo.append(name)
                memo += kept
                memo.append(info)
                memo.append(info_state)
                if path_run[0] == _SHORT_TEXT:
                    memo.append(path)
                stack += (index, info)
                pos = found.end()
        except _DOUBTS:
            pass
        return pos

    # Runs; those that were checked before are remembered. None, or one of _DOUBTS: not as it should be.

    def _chunk(self, pos: int) -> _Chunk | None:
        """Return its length in the data, its offsets and sizes, and what they leave in the memo."""
        data = self._data
        end = data.find(_CHUNK_END, pos, pos + _LONGEST) + len(_CHUNK_END)
        known = self._chunk_runs.get(data[pos:end])
        if known is not None:
            return known
        found = _CHUNK.match(data, pos)
        if found is None:
            return None
        cls, first, offsets_run, second, sizes_run = found.groups()
        try:
            if (cls, first, second) not in self._chunk_names:
                self._check_chunk(cls, first, second)
            offsets, kept = self._size_runs.get(offsets_run) or self._size(offsets_run)
            sizes, kept_too = self._size_runs.get(sizes_run) or self._size(sizes_run)
        except _DOUBTS:
            return None
        run = found[0]
        return _remember(self._chunk_runs, run, (len(run), offsets, sizes, kept + kept_too))

    def _check_chunk(self, cls: bytes, first: bytes, second: bytes) -> None:
        if (
            self._class(cls) is not ChunkStorageMetadata
            or self._name(first) != "offsets"
            or self._name(second) != "sizes"
        ):
            raise ValueError
        self._chunk_names.add((cls, first, second))

    def _head(self, pos: int) -> _Head | None:
        """Return its length in the data, the fields of the properties, what their state leaves in the memo, the size,
        and what that leaves there.
        """
        found = _HEAD.match(self._data, pos)
        if found is None:
            return None
        (
            cls, first, inner, dtype, layout, gradient, memory_format, pinned, strides_run, second, size_run, third,
        ) = found.groups()  # fmt: skip
        encoded: tuple[Any, ...] = (
            self._at(dtype), self._at(layout), gradient == _TRUE, self._at(memory_format), pinned == _TRUE,
        )  # fmt: skip
        kept_first: tuple[Any, ...] = ()
        if strides_run is not None:
            strides = None if strides_run == _NONE else self._strides(strides_run)
            encoded += (strides,)
            kept_first = (strides,) if strides and strides_run[0] not in _GETS else ()
        if (
            self._class(cls) is not TensorStorageMetadata
            or self._class(inner) is not TensorProperties
            or [self._name(ref) for ref in (first, second, third)] != ["properties", "size", "chunks"]
            or [type(encoded[0]), type(encoded[1]), type(encoded[3])]
            != [torch.dtype, torch.layout, MemoryFormatEncoding]
        ):
            return None
        properties: Any = _bare(TensorProperties)
        properties.__setstate__(encoded[:TENSOR_PROPERTIES])
        size, kept = self._size_runs.get(size_run) or self._size(size_run)
        run = found[0]
        return _remember(self._head_runs, run, (len(run), properties.__dict__, (*kept_first, encoded), size, kept))

    def _size(self, run: bytes) -> tuple[torch.Size, tuple[Any, ...]]:
        """A size, and what it leaves in the memo."""
        split = _ref_length(run)
        made = self._at(run[:split])
        if split == len(run):
            if type(made) is not torch.Size:
                raise TypeError
            return _remember(self._size_runs, run, (made, ()))
        if made is not _SIZE:
            raise TypeError
        dimensions = _numbers_in(run[split:-4])  # what follows makes the size of the tuple
        args = (dimensions,)
        size = _SIZE.call(args)
        return _remember(self._size_runs, run, (size, (dimensions, args, size) if dimensions else (args, size)))

    def _strides(self, run: bytes) -> tuple[int, ...]:
        if run[0] not in _GETS:
            return _numbers_in(run)
        strides = self._at(run)
        if type(strides) is not tuple:
            raise TypeError
        return strides

    def _check_item(
        self, index_begins: bytes, hint_name: bytes, offset_name: bytes | None, info_begins: bytes, start_name: bytes
    ) -> None:
        """Whether the references in an item are those that an item has."""
        self._check_begin(index_begins, MetadataIndex, "fqn")
        self._check_begin(info_begins, StorageInfo, "relative_path")
        if (
            self._name(hint_name) != "index"
            or self._name(start_name) != "offset"
            or (offset_name is not None and self._name(offset_name) != "offset")
        ):
            raise ValueError
        self._item_names.add((index_begins, hint_name, offset_name, info_begins, start_name))

    def _check_begin(self, run: bytes, cls: type[Any], field: str) -> None:
        found = _BEGIN.fullmatch(run)
        assert found is not None
        if self._class(found[1]) is not cls or self._name(found[2]) != field:
            raise ValueError

    def _numbers(self, run: bytes) -> tuple[dict[str, int], str]:
        """Fields that are numbers, and the name of the one that comes after them."""
        pairs = _NUMBERED.findall(run)
        names = [self._name(ref) for ref, _ in pairs]
        if any(name.startswith("__") for name in names):
            raise ValueError
        fields = {name: _number(value) for name, (_, value) in zip(names[:-1], pairs[:-1], strict=True)}
        return _remember(self._number_runs, run, (fields, names[-1]))

    # Single opcodes.

    def _at(self, ref: bytes) -> Any:
        return self._memo[int.from_bytes(ref[1:], "little")]

    def _name(self, ref: bytes) -> str:
        name = self._at(ref)
        if type(name) is not str:
            raise TypeError
        return name

    def _text(self, run: bytes) -> str:
        if run[0] != _SHORT_TEXT:
            return self._name(run)
        if run[1] != len(run) - 3:
            raise ValueError  # some other byte of the text or after it looks like the end
        return str(run[2:-1], "utf-8", "surrogatepass")

    def _class(self, ref: bytes) -> type[Any] | None:
        known = self._at(ref)
        return known.new if type(known) is Known else None


_SHORT_TUPLES = {pickle.TUPLE1[0]: 1, pickle.TUPLE2[0]: 2, pickle.TUPLE3[0]: 3}


def _numbers_in(run: bytes) -> tuple[int, ...]:
    """A tuple of numbers, with its memoizing unless it is empty."""
    numbers = tuple(map(_number, _NUMBERS.findall(run)))
    if numbers and _SHORT_TUPLES.get(run[-2], len(numbers)) != len(numbers):
        raise ValueError
    return numbers


def _remember(runs: dict[bytes, _Value], run: bytes, value: _Value) -> _Value:
    if len(runs) >= REMEMBERED:
        runs.clear()
    runs[run] = value
    return value


def _ref_length(run: bytes) -> int:
    return 2 if run[0] == _GET else 5


def _number(run: bytes) -> int:
    if run[0] == _LONG:
        return int.from_bytes(run[2:], "little", signed=True)
    return int.from_bytes(run[1:], "little")

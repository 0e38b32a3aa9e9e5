"""A small pickle machine that can build what a checkpoint's ``.metadata`` consists of, and nothing else.

``pickle.Unpickler`` with a restricted ``find_class`` would not do: it still calls whatever is allowed with any
arguments, sets attributes on classes and functions, takes memory for a memo index that the data names, and hashes
nested tuples that take for ever to hash. This machine never looks a name up in a module: a name in the data is a key of
the tables in ``vocabulary.py``. Only instances that the machine made itself get state. Memory and time stay
proportional to the data (crafted hash collisions aside).

What metadata says once for every tensor and chunk does not go through it opcode by opcode: ``repeats.py``.

It speaks what pickle protocols 2 to 5 use for plain data and instances. ``FileSystemWriter`` pickles with Python's
default, which is 4, and 5 from Python 3.14.
"""

from __future__ import annotations

import dataclasses
import pickle
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties

from ..errors import AzureCheckpointError, CorruptCheckpointError, UnsafeMetadataError, UnsupportedCheckpointError
from .repeats import Repeats
from .vocabulary import (
    KNOWN,
    STATE_CLASSES,
    ForbiddenUse,
    Known,
    NewerTorch,
    is_newer_torch,
    opted_in,
    quote,
    set_any_state,
)

__all__ = ["unpickle"]

_MAX_KEY_PARTS = 64
_MAX_ATTRIBUTES = 32
# Paths copy their parts, so a few bytes that name one long part again and again would take memory without bound.
_PATH_CHARACTERS_PER_BYTE = 16


def unpickle(data: bytes, where: str) -> object:
    """The object that ``data`` describes.

    Args:
        data: a whole pickle.
        where: names the blob in messages.

    Raises:
        UnsafeMetadataError: the data names or does something that metadata never does. Nothing of it was run.
        UnsupportedCheckpointError: the data comes from a newer torch, or from another pickle protocol.
        CorruptCheckpointError: the data is cut short or garbage.
    """
    return _Machine(data, where).run()


class _Machine:
    def __init__(self, data: bytes, where: str, *, repeats: bool = True) -> None:
        self._data = data
        self._where = where
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        self._take_repeats = Repeats(data, self._stack, self._marks, self._memo).after if repeats else {}
        self._budget = 4096 + _PATH_CHARACTERS_PER_BYTE * len(data)
        self._attributes: set[str] = set()  # names that passed the check once
        self._opted_in: dict[str, Any] | None = None
        # By id, with a reference that keeps the id taken: the values may be unhashable, or lie about equality.
        self._opted_in_used: dict[int, Any] = {}
        self._made_by_opted_in: dict[int, Any] = {}

    def run(self) -> object:
        data, stack, marks, memo = self._data, self._stack, self._marks, self._memo
        if len(data) < 2 or data[0] != pickle.PROTO[0]:
            self._corrupt(0, "it is not a pickle of protocol 2 or later")
        if data[1] not in _PROTOCOLS:
            raise UnsupportedCheckpointError(
                f"{self._where} is a pickle of protocol {data[1]}; this reader knows {_PROTOCOLS[0]} to "
                f"{_PROTOCOLS[-1]}. Upgrade azure-torch-ckpt."
            )
        push, handlers = stack.append, _HANDLERS
        pos = 2
        try:
            while True:
                op = data[pos]
                pos += 1
                # These are four fifths of real metadata: calls would cost more than the work.
                if op == _MEMOIZE:
                    memo.append(stack[-1])
                elif op == _BINGET:
                    push(memo[data[pos]])
                    pos += 1
                elif op == _LONG_BINGET:
                    push(memo[int.from_bytes(data[pos : pos + 4], "little")])
                    pos += 4
                elif op == _SHORT_BINUNICODE:
                    end = pos + 1 + data[pos]
                    if end > len(data):
                        raise EOFError(f"a value of {data[pos]} bytes reaches past the end")
                    push(str(data[pos + 1 : end], "utf-8", "surrogatepass"))  # as pickle encodes it
                    pos = end
                elif op == _BININT1:
                    push(data[pos])
                    pos += 1
                elif op == _TUPLE1:
                    stack[-1] = (stack[-1],)
                elif op == _TUPLE2:
                    last = stack.pop()
                    stack[-1] = (stack[-1], last)
                elif op == _MARK:
                    marks.append(len(stack))
                elif op == _EMPTY_TUPLE:
                    push(())
                elif op == _EMPTY_DICT:
                    push({})
                elif op == _STOP:
                    break
                else:
                    handler = handlers.get(op)
                    if handler is None:
                        self._refuse_opcode(op, pos - 1)
                    pos = handler(self, pos)
        except AzureCheckpointError:
            raise
        except Exception as error:
            # Whatever fails here fails because of the data: an empty stack, bad UTF-8, a class's own complaint.
            self._corrupt(pos, f"{type(error).__name__}: {error}", error)
        if len(stack) != 1 or marks:
            self._corrupt(pos, "it ends in the middle of something")
        if pos != len(data):
            self._corrupt(pos, f"{len(data) - pos} bytes follow its end")
        return stack[0]

    # Handlers: take the position after the opcode, return the position after its argument.

    def _plain(self, pos: int) -> int:
        self._stack.append(_PLAIN[self._data[pos - 1]]())
        return pos

    def _number(self, pos: int) -> int:
        form = _NUMBERS[self._data[pos - 1]]
        self._stack.append(form.unpack_from(self._data, pos)[0])
        return pos + form.size

    def _sized(self, pos: int) -> int:
        width, convert = _SIZED[self._data[pos - 1]]
        start = pos + width
        end = start + int.from_bytes(self._data[pos:start], "little")
        if end > len(self._data):
            raise EOFError(f"a value of {end - start} bytes reaches past the end")
        self._stack.append(convert(self._data[start:end]))
        return end

    def _frame(self, pos: int) -> int:
        (length,) = struct.unpack_from("<Q", self._data, pos)
        if pos + 8 + length > len(self._data):
            raise EOFError(f"a frame of {length} bytes reaches past the end")
        return pos + 8

    def _put(self, pos: int) -> int:
        width = _PUT_WIDTH[self._data[pos - 1]]
        # Picklers number their memo in order, so the index says nothing new.
        if int.from_bytes(self._data[pos : pos + width], "little") != len(self._memo):
            raise ValueError("the memo is numbered out of order")
        self._memo.append(self._stack[-1])
        return pos + width

    def _tuple3(self, pos: int) -> int:
        last = self._stack.pop()
        middle = self._stack.pop()
        self._stack[-1] = (self._stack[-1], middle, last)
        return pos

    def _tuple(self, pos: int) -> int:
        self._stack.append(tuple(self._pop_to_mark()))
        return pos

    def _frozenset(self, pos: int) -> int:
        self._stack.append(frozenset(self._key(item) for item in self._pop_to_mark()))
        return pos

    def _add_items(self, pos: int) -> int:
        items = self._pop_to_mark()
        target = self._stack[-1]
        if type(target) is not set:
            self._own(target)
        target.update([self._key(item) for item in items])
        return pos

    def _append(self, pos: int) -> int:
        item = self._stack.pop()
        return self._extend([item], pos)

    def _appends(self, pos: int) -> int:
        return self._extend(self._pop_to_mark(), pos)

    def _extend(self, items: list[Any], pos: int) -> int:
        target = self._stack[-1]
        if type(target) is not list:
            self._own(target)
        target.extend(items)
        return pos

    def _set_item(self, pos: int) -> int:
        value = self._stack.pop()
        key = self._stack.pop()
        return self._update([key, value], pos)

    def _set_items(self, pos: int) -> int:
        return self._update(self._pop_to_mark(), pos)

    def _update(self, items: list[Any], pos: int) -> int:
        target = self._stack[-1]
        if type(target) is not dict and type(target) is not OrderedDict:
            self._own(target)
        if len(items) % 2:
            raise ValueError("a key has no value")
        for index in range(0, len(items), 2):
            key = items[index]
            target[key if type(key) is str else self._key(key)] = items[index + 1]
        return pos

    def _global(self, pos: int) -> int:
        middle = self._data.index(b"\n", pos)
        end = self._data.index(b"\n", middle + 1)
        self._stack.append(self._find(self._data[pos:middle].decode(), self._data[middle + 1 : end].decode()))
        return end + 1

    def _stack_global(self, pos: int) -> int:
        name = self._stack.pop()
        module = self._stack.pop()
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name is not a string")
        self._stack.append(self._find(module, name))
        return pos

    def _new_object(self, pos: int) -> int:
        args = self._stack.pop()
        cls = self._stack.pop()
        if type(args) is not tuple:
            raise TypeError("the arguments are not a tuple")
        if type(cls) is Known and cls.new is not None and not args:
            made: Any = object.__new__(cls.new)
        elif self._opted_in_used.get(id(cls), self) is cls and isinstance(cls, type):
            made = cls.__new__(cls, *args)
            self._made_by_opted_in[id(made)] = made
        else:
            self._refuse_use(cls, "creates an instance of")
        self._stack.append(made)
        return pos

    def _reduce(self, pos: int) -> int:
        args = self._stack.pop()
        function = self._stack.pop()
        if type(args) is not tuple:
            raise TypeError("the arguments are not a tuple")
        if type(function) is Known and function.call is not None:
            for arg in args:
                if type(arg) is str:
                    self._budget -= len(arg)
            if self._budget < 0:
                raise ValueError("it describes far more than it contains")
            try:
                made = function.call(args)
            except NewerTorch as error:
                self._refuse_newer(str(error))
            except ForbiddenUse:
                self._refuse_name(function.name)
        elif self._opted_in_used.get(id(function), self) is function:
            made = function(*args)
            self._made_by_opted_in[id(made)] = made
        else:
            self._refuse_use(function, "calls")
        self._stack.append(made)
        return pos

    def _build(self, pos: int) -> int:
        state = self._stack.pop()
        target = self._stack[-1]
        cls = type(target)
        factories = STATE_CLASSES.get(cls)
        if factories is None:
            self._own(target)
            set_any_state(target, state)
        elif cls is TensorProperties and type(state) is tuple:
            # torch unpacks exactly as many fields as it knows; a newer torch appends its own.
            target.__setstate__(state[:_TENSOR_PROPERTIES])
        elif type(state) is not dict:
            raise TypeError(f"the state of a {cls.__name__} is not a dict")
        else:
            if len(state) > _MAX_ATTRIBUTES:
                raise ValueError(f"a {cls.__name__} has no {len(state)} attributes")
            if not state.keys() <= self._attributes:
                for name in state:
                    if type(name) is not str or name.startswith("__"):
                        raise TypeError(f"a {cls.__name__} has no attribute {quote(name)}")
                self._attributes.update(state)
            if cls is MetadataIndex and not (
                type(state.get("fqn")) is str and type(state.get("offset")) in (torch.Size, type(None))
            ):
                raise TypeError("a MetadataIndex needs a name and an offset")  # and must be quick to hash
            target.__dict__.update(state)
            for name, factory in factories:
                if name not in state:
                    target.__dict__[name] = factory()
        take = self._take_repeats.get(cls)
        return pos if take is None else take(pos)

    # What the handlers stand on.

    def _pop_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _key(self, key: Any) -> Any:
        """``key`` if hashing it is cheap. Nested tuples can take for ever, or overflow the C stack."""
        cls = type(key)
        if cls in _KEY_TYPES or self._made_by_opted_in.get(id(key), self) is key:
            return key
        if cls is tuple and len(key) <= _MAX_KEY_PARTS and all(type(part) in _KEY_TYPES for part in key):
            return key
        raise TypeError(f"an object of type {cls.__name__} is used as a key")

    def _own(self, target: Any) -> None:
        """Only what an opted-in class or function made may be changed in ways that the machine does not know."""
        if self._made_by_opted_in.get(id(target), self) is not target:
            self._refuse_use(target, "changes")

    def _find(self, module: str, name: str) -> object:
        found = KNOWN.get((module, name))
        if found is None:
            if self._opted_in is None:
                self._opted_in = opted_in()
            found = self._opted_in.get(f"{module}.{name}")
            if found is None:
                if is_newer_torch(module, name):
                    self._refuse_newer(f"{module}.{name}")
                self._refuse_name(f"{module}.{name}")
            self._opted_in_used[id(found)] = found
        return found

    # Refusals.

    def _corrupt(self, pos: int, reason: str, cause: BaseException | None = None) -> NoReturn:
        raise CorruptCheckpointError(
            f"{self._where} is not readable as checkpoint metadata: {reason[:300]} (at byte {pos} of "
            f"{len(self._data)}). It is cut short, damaged or not a .metadata; restore it or use another checkpoint."
        ) from cause

    def _refuse_opcode(self, op: int, pos: int) -> NoReturn:
        name = next((known.name for known in pickletools.opcodes if ord(known.code) == op), None)
        if name is None:
            self._corrupt(pos, f"byte 0x{op:02x} is no pickle opcode")
        raise UnsafeMetadataError(
            f"{self._where} uses the pickle opcode {name} at byte {pos}, which metadata never needs. It is "
            "damaged or was made to do harm; nothing of it was run. Use another checkpoint."
        )

    def _refuse_use(self, target: object, verb: str) -> NoReturn:
        what = target.name if type(target) is Known else f"an object of type {type(target).__name__}"
        raise UnsafeMetadataError(
            f"{self._where} {verb} {what} in a way that metadata never does. It is damaged or was made to do harm; "
            "that was not done. Use another checkpoint."
        )

    def _refuse_newer(self, name: str) -> NoReturn:
        raise UnsupportedCheckpointError(
            f"{self._where} names {quote(name)}, which torch {torch.__version__} does not have: it was written by a "
            "newer torch. Upgrade torch."
        )

    def _refuse_name(self, name: str) -> NoReturn:
        raise UnsafeMetadataError(
            f"{self._where} names {quote(name)}, which is no part of a checkpoint's metadata; to load it would run "
            "code that whoever wrote the blob has chosen. It was not run. If your own planner put it there and you "
            "trust the checkpoint, register it with torch.serialization.add_safe_globals before you load (names under "
            "torch, os and sys cannot be registered); otherwise use another checkpoint."
        )


_TENSOR_PROPERTIES = len(dataclasses.fields(TensorProperties))
_KEY_TYPES = frozenset((str, int, float, bool, bytes, type(None), MetadataIndex, torch.dtype, torch.Size))

_PROTOCOLS = range(2, 6)
_MEMOIZE = pickle.MEMOIZE[0]
_BINGET = pickle.BINGET[0]
_LONG_BINGET = pickle.LONG_BINGET[0]
_BININT1 = pickle.BININT1[0]
_MARK = pickle.MARK[0]
_EMPTY_TUPLE = pickle.EMPTY_TUPLE[0]
_TUPLE1 = pickle.TUPLE1[0]
_TUPLE2 = pickle.TUPLE2[0]
_SHORT_BINUNICODE = pickle.SHORT_BINUNICODE[0]
_EMPTY_DICT = pickle.EMPTY_DICT[0]
_STOP = pickle.STOP[0]
_PLAIN: dict[int, Callable[[], Any]] = {
    pickle.NONE[0]: lambda: None,
    pickle.NEWTRUE[0]: lambda: True,
    pickle.NEWFALSE[0]: lambda: False,
    pickle.EMPTY_LIST[0]: list,
    pickle.EMPTY_SET[0]: set,
}
_NUMBERS = {
    pickle.BININT[0]: struct.Struct("<i"),
    pickle.BININT2[0]: struct.Struct("<H"),
    pickle.BINFLOAT[0]: struct.Struct(">d"),
}


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")  # as pickle encodes it


def _long(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


# Opcodes whose argument begins with its length: the length's width in bytes, what the bytes become.
_SIZED: dict[int, tuple[int, Callable[[bytes], Any]]] = {
    pickle.LONG1[0]: (1, _long),  # LONG4 is for integers above 255 bytes
    pickle.BINUNICODE[0]: (4, _text),
    pickle.BINUNICODE8[0]: (8, _text),
    pickle.SHORT_BINBYTES[0]: (1, bytes),
    pickle.BINBYTES[0]: (4, bytes),
    pickle.BINBYTES8[0]: (8, bytes),
    pickle.BYTEARRAY8[0]: (8, bytearray),
}
_PUT_WIDTH = {pickle.BINPUT[0]: 1, pickle.LONG_BINPUT[0]: 4}
_HANDLERS: dict[int, Callable[[_Machine, int], int]] = {
    **dict.fromkeys(_PLAIN, _Machine._plain),
    **dict.fromkeys(_NUMBERS, _Machine._number),
    **dict.fromkeys(_SIZED, _Machine._sized),
    **dict.fromkeys(_PUT_WIDTH, _Machine._put),
    pickle.FRAME[0]: _Machine._frame,
    pickle.TUPLE3[0]: _Machine._tuple3,
    pickle.TUPLE[0]: _Machine._tuple,
    pickle.FROZENSET[0]: _Machine._frozenset,
    pickle.ADDITEMS[0]: _Machine._add_items,
    pickle.APPEND[0]: _Machine._append,
    pickle.APPENDS[0]: _Machine._appends,
    pickle.SETITEM[0]: _Machine._set_item,
    pickle.SETITEMS[0]: _Machine._set_items,
    pickle.GLOBAL[0]: _Machine._global,
    pickle.STACK_GLOBAL[0]: _Machine._stack_global,
    pickle.NEWOBJ[0]: _Machine._new_object,
    pickle.REDUCE[0]: _Machine._reduce,
    pickle.BUILD[0]: _Machine._build,
}

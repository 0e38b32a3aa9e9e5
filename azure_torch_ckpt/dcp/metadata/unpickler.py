"""`MetadataUnpickler`: a pickle machine that can build what a checkpoint's ``.metadata`` consists of, and nothing else.

``pickle.Unpickler`` with a restricted ``find_class`` is not enough: it still calls whatever is allowed with any
arguments, sets attributes on classes and functions, takes memory for a memo index that the data names, and hashes
nested tuples that take for ever to hash. This machine never looks a name up in a module: a name in the data is a key of
the tables in ``vocabulary.py``, or an inert stand-in is made for it (``foreign_classes.py``). Only instances that the
machine made itself get state. Memory and time stay proportional to the data (crafted hash collisions aside).

What metadata repeats for every tensor and chunk does not go through it opcode by opcode: ``fast_path.py``.

It knows the opcodes that pickle protocols 2 to 5 use for plain data and instances. ``FileSystemWriter`` pickles with
Python's default, which is 4, and 5 from Python 3.14.
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties

from azure_torch_ckpt._internal.torch_private import MemoryFormatEncoding
from azure_torch_ckpt.dcp.metadata.fast_path import FastPath
from azure_torch_ckpt.dcp.metadata.foreign_classes import (
    Foreign,
    ForeignClass,
    Refusals,
    known_base,
    may_be_foreign,
    settle,
)
from azure_torch_ckpt.dcp.metadata.vocabulary import (
    KNOWN,
    NUMBERS,
    PLAIN,
    SIZED,
    STATE_CLASSES,
    TENSOR_PROPERTIES,
    ForbiddenUse,
    Known,
    NewerTorch,
    opted_in,
    quote,
    set_any_state,
)
from azure_torch_ckpt.errors import AzureCheckpointError, UnsupportedCheckpointError

__all__ = ["HANDLERS", "MetadataUnpickler", "unpickle"]

# What costs more than this is counted: to hash a key or a size again and again, to copy attributes or parts of paths.
_FREE_PARTS = 64
_FREE_ATTRIBUTES = 32
_FREE_BITS = 4096
_DEEPEST_KEY = 100
# So a few bytes that name one long thing many times take neither memory nor time without bound.
_COST_PER_BYTE = 16
_ATTRIBUTE_COST = 16


def unpickle(data: bytes, where: str) -> object:
    """Make the object that a pickle describes, without what is foreign in a ``Metadata`` and not needed by a load.

    Errors as of `schema.load_metadata`.
    """
    machine = MetadataUnpickler(data, where)
    made = machine.run()
    machine.settle(made)
    return made


class MetadataUnpickler:
    """Runs one pickle; arguments as for `unpickle`. Without `fast`, every opcode goes through the machine.

    Attributes:
        memo: what the pickle has memoized.
        fast_path: what takes the entries behind an object, by the object's class.
    """

    def __init__(self, data: bytes, where: str, *, fast: bool = True) -> None:
        self._data = data
        self._where = where
        self._refusals = Refusals(where, len(data))
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self.memo: list[Any] = []
        self.fast_path = FastPath(data, self._stack, self._marks, self.memo).after() if fast else {}
        self._budget = 4096 + _COST_PER_BYTE * len(data)
        self._attributes: set[str] = set()  # names that passed the check once
        self._opted_in: dict[str, Any] | None = None
        # By id, with a reference that keeps the id taken: the values may be unhashable, or lie about equality.
        self._opted_in_used: dict[int, Any] = {}
        self._made_by_opted_in: dict[int, Any] = {}
        self._given_to_opted_in: dict[int, list[Any]] = {}
        self._met_foreign = False

    def run(self) -> object:
        """Make the object that the pickle describes, with stand-ins for what is foreign; errors as of `unpickle`."""
        data, stack, marks, memo = self._data, self._stack, self._marks, self.memo
        if len(data) < 2 or data[0] != pickle.PROTO[0]:
            self._refusals.corrupt(0, "it is not a pickle of protocol 2 or later")
        if data[1] not in _PROTOCOLS:
            raise UnsupportedCheckpointError(
                f"{self._where} is a pickle of protocol {data[1]}; this reader knows {_PROTOCOLS[0]} to "
                f"{_PROTOCOLS[-1]}. Upgrade azure-torch-ckpt."
            )
        push, handlers = stack.append, HANDLERS
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
                        self._refusals.refuse_opcode(op, pos - 1)
                    pos = handler(self, pos)
        except AzureCheckpointError:
            raise
        except Exception as error:
            # What fails here fails because of the data: an empty stack, bad UTF-8, an error of a class.
            self._refusals.corrupt(pos, f"{type(error).__name__}: {error}", error)
        if len(stack) != 1 or marks:
            self._refusals.corrupt(pos, "it ends in the middle of something")
        if pos != len(data):
            self._refusals.corrupt(pos, f"{len(data) - pos} bytes follow its end")
        return stack[0]

    def settle(self, made: object) -> None:
        """Remove what is foreign, or refuse it where a load would need it."""
        if not self._met_foreign:
            return
        found = made.made_of if type(made) is Foreign else made if type(made) is ForeignClass else None
        if isinstance(made, Metadata):
            found = settle(made, self._given_to_opted_in)
        if found is not None:
            self._refusals.refuse_class(found)

    # Handlers: take the position after the opcode, return the position after its argument.

    def _plain(self, pos: int) -> int:
        self._stack.append(PLAIN[self._data[pos - 1]]())
        return pos

    def _number(self, pos: int) -> int:
        form = NUMBERS[self._data[pos - 1]]
        self._stack.append(form.unpack_from(self._data, pos)[0])
        return pos + form.size

    def _sized(self, pos: int) -> int:
        width, convert = SIZED[self._data[pos - 1]]
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
        if int.from_bytes(self._data[pos : pos + width], "little") != len(self.memo):
            raise ValueError("the memo is numbered out of order")
        self.memo.append(self._stack[-1])
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
        if type(target) is not set and not self._own(target, items):
            return pos
        target.update([self._key(item) for item in items])
        return pos

    def _append(self, pos: int) -> int:
        item = self._stack.pop()
        return self._extend([item], pos)

    def _appends(self, pos: int) -> int:
        return self._extend(self._pop_to_mark(), pos)

    def _extend(self, items: list[Any], pos: int) -> int:
        target = self._stack[-1]
        if type(target) is not list and not self._own(target, items):
            return pos
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
        if type(target) is not dict and type(target) is not OrderedDict and not self._own(target, items):
            return pos
        if len(items) % 2:
            raise ValueError("a key has no value")
        for index in range(0, len(items), 2):
            key = items[index]
            target[key if type(key) is str else self._key(key)] = items[index + 1]
        return pos

    def _pop(self, pos: int) -> int:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()
        return pos

    def _pop_mark(self, pos: int) -> int:
        self._pop_to_mark()
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
        elif type(cls) is ForeignClass:
            made = cls.new(args)
        elif self._opted_in_used.get(id(cls), self) is cls and isinstance(cls, type):
            made = cls.__new__(cls, *args)
            self._note_opted_in(made, args)
        else:
            self._refusals.refuse_use(cls, "creates an instance of")
        self._stack.append(made)
        return pos

    def _new_object_with_keywords(self, pos: int) -> int:
        cls = self._stack[-3]
        if type(cls) is not ForeignClass:
            self._refusals.refuse_use(cls, "creates an instance of")
        self._stack[-3:] = [Foreign(cls)]
        return pos

    def _reduce(self, pos: int) -> int:
        args = self._stack.pop()
        function = self._stack.pop()
        if type(args) is not tuple:
            raise TypeError("the arguments are not a tuple")
        if type(function) is ForeignClass:
            made: Any = function.call(args)
        elif function is _GETATTR and len(args) == 2 and type(args[0]) is ForeignClass and type(args[1]) is str:
            made = args[0].member(args[1])
        elif type(function) is Known and function.call is not None:
            for arg in args:
                if type(arg) is str or (type(arg) is tuple and len(arg) > _FREE_PARTS):
                    self._spend(len(arg))
            try:
                made = function.call(args)
            except NewerTorch as error:
                self._refusals.refuse_newer(str(error))
            except ForbiddenUse:
                self._refusals.refuse_name(function.name)
        elif self._opted_in_used.get(id(function), self) is function:
            made = function(*args)
            self._note_opted_in(made, args)
        else:
            self._refusals.refuse_use(function, "calls")
        self._stack.append(made)
        return pos

    def _build(self, pos: int) -> int:
        state = self._stack.pop()
        target = self._stack[-1]
        if type(target) is Foreign:
            base = known_base(state)
            if base is None or target.made_of.is_newer:
                target.bare = False
                return pos
            target.become(base[0])
            state = base[1]
        cls = type(target)
        factories = STATE_CLASSES.get(cls)
        if factories is None:
            if self._own(target, [state]):
                set_any_state(target, state)
        elif cls is TensorProperties and type(state) is tuple:
            target.__setstate__(state[:TENSOR_PROPERTIES])
        elif type(state) is not dict:
            raise TypeError(f"the state of a {cls.__name__} is not a dict")
        else:
            if len(state) > _FREE_ATTRIBUTES:
                self._spend(_ATTRIBUTE_COST * len(state))
            if not state.keys() <= self._attributes:
                for name in state:
                    if type(name) is not str or name.startswith("__"):
                        raise TypeError(f"a {cls.__name__} has no attribute {quote(name)}")
                self._attributes.update(state)
            if type(fqn := state.get("fqn")) is Foreign:
                state["fqn"] = fqn.value
            if cls is MetadataIndex and not (
                type(state.get("fqn")) is str and type(state.get("offset")) in (torch.Size, type(None))
            ):
                raise TypeError("a MetadataIndex needs a name and an offset")  # and must be quick to hash
            target.__dict__.update(state)
            for name, factory in factories:
                if name not in state:
                    target.__dict__[name] = factory()
        take = self.fast_path.get(cls)
        return pos if take is None else take(pos)

    # What the handlers use.

    def _pop_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _spend(self, cost: int) -> None:
        self._budget -= cost
        if self._budget < 0:
            raise ValueError("it describes far more than it contains")

    def _key(self, key: Any) -> Any:
        """``key`` if hashing it is cheap. Nested tuples can take for ever, or overflow the C stack."""
        cls = type(key)
        if cls is MetadataIndex or cls is torch.Size:
            size = key if cls is torch.Size else key.__dict__.get("offset")
            if size is not None and len(size) > _FREE_PARTS:
                self._spend(len(size))
        elif cls is tuple:
            if len(key) > _FREE_PARTS or not all(type(part) in _CHEAP_TYPES for part in key):
                self._look_at_key(key)
        elif cls is int:
            if key.bit_length() > _FREE_BITS:
                self._spend(key.bit_length())
        elif cls is Foreign:
            return key.value if type(key.value) is str else key
        elif cls not in _KEY_TYPES and self._made_by_opted_in.get(id(key), self) is not key:
            raise TypeError(f"an object of type {cls.__name__} is used as a key")
        return key

    def _look_at_key(self, key: tuple[Any, ...]) -> None:
        left: list[tuple[Any, int]] = [(key, 1)]
        while left:
            part, depth = left.pop()
            if type(part) is tuple:
                if depth > _DEEPEST_KEY or len(part) > self._budget:
                    raise TypeError("an object of type tuple is used as a key")
                self._budget -= len(part)
                left.extend((inner, depth + 1) for inner in part)
            elif type(part) is not Foreign:
                self._key(part)

    def _own(self, target: Any, given: Iterable[Any]) -> bool:
        """Whether `target` takes what is given to it. A foreign object does not.

        Only objects of opted-in classes or functions may be changed in ways that the machine does not know.
        """
        if type(target) is Foreign:
            target.bare = False
            return False
        if self._met_foreign and type(target) in (str, int, float, bytes):
            return False  # it stands for an instance of a foreign class, which may have attributes
        if self._made_by_opted_in.get(id(target), self) is not target:
            self._refusals.refuse_use(target, "changes")
        self._given_to_opted_in[id(target)].extend(given)
        return True

    def _note_opted_in(self, made: Any, given: Iterable[Any]) -> None:
        self._made_by_opted_in[id(made)] = made
        self._given_to_opted_in.setdefault(id(made), []).extend(given)

    def _find(self, module: str, name: str) -> object:
        found = KNOWN.get((module, name))
        if found is None:
            if self._opted_in is None:
                self._opted_in = opted_in()
            found = self._opted_in.get(f"{module}.{name}")
            if found is None:
                found = ForeignClass(module, name)
                if not may_be_foreign(module, name):
                    self._refusals.refuse_class(found)
                self._met_foreign = True
                return found
            self._opted_in_used[id(found)] = found
        return found


# What hashing costs next to nothing; and what else may be a key.
_CHEAP_TYPES = frozenset((str, float, bool, bytes, type(None), torch.dtype))
_KEY_TYPES = _CHEAP_TYPES | {frozenset, torch.layout, MemoryFormatEncoding, ForeignClass}

_GETATTR = KNOWN["builtins", "getattr"]

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
_PUT_WIDTH = {pickle.BINPUT[0]: 1, pickle.LONG_BINPUT[0]: 4}
HANDLERS: dict[int, Callable[[MetadataUnpickler, int], int]] = {
    **dict.fromkeys(PLAIN, MetadataUnpickler._plain),
    **dict.fromkeys(NUMBERS, MetadataUnpickler._number),
    **dict.fromkeys(SIZED, MetadataUnpickler._sized),
    **dict.fromkeys(_PUT_WIDTH, MetadataUnpickler._put),
    pickle.FRAME[0]: MetadataUnpickler._frame,
    pickle.TUPLE3[0]: MetadataUnpickler._tuple3,
    pickle.TUPLE[0]: MetadataUnpickler._tuple,
    pickle.FROZENSET[0]: MetadataUnpickler._frozenset,
    pickle.ADDITEMS[0]: MetadataUnpickler._add_items,
    pickle.APPEND[0]: MetadataUnpickler._append,
    pickle.APPENDS[0]: MetadataUnpickler._appends,
    pickle.SETITEM[0]: MetadataUnpickler._set_item,
    pickle.SETITEMS[0]: MetadataUnpickler._set_items,
    pickle.POP[0]: MetadataUnpickler._pop,
    pickle.POP_MARK[0]: MetadataUnpickler._pop_mark,
    pickle.GLOBAL[0]: MetadataUnpickler._global,
    pickle.STACK_GLOBAL[0]: MetadataUnpickler._stack_global,
    pickle.NEWOBJ[0]: MetadataUnpickler._new_object,
    pickle.NEWOBJ_EX[0]: MetadataUnpickler._new_object_with_keywords,
    pickle.REDUCE[0]: MetadataUnpickler._reduce,
    pickle.BUILD[0]: MetadataUnpickler._build,
}

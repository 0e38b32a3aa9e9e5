"""`pickle_metadata`: torch's `Metadata` as a pickle in the form that every version of torch reads.

torch 2.15 added the strides of the tensor to the state of ``TensorProperties``, which earlier versions cannot unpack.
No load looks at them, and for a row-major tensor they say nothing that its size does not say.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import TensorWriteData

__all__ = ["pickle_metadata"]

_FIELDS = 5  # of TensorProperties, that every torch knows
_Reduced: TypeAlias = "tuple[Any, ...]"


def pickle_metadata(metadata: Metadata) -> bytes:
    """Pickle metadata without the strides of tensors for which they follow from the size.

    Where they do not (a transposed tensor), they stay; torch 2.14 and earlier do not read that, as if torch 2.15 itself
    had written it.
    """
    if not hasattr(TensorProperties, "strides"):
        return pickle.dumps(metadata)
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer)
    row_major: set[int] = set()  # by id: picklers come to the holder of the properties first

    def stored(entry: TensorStorageMetadata) -> _Reduced:
        note(entry.properties, entry.size, entry.chunks[0].sizes if entry.chunks else None)
        return entry.__reduce_ex__(pickle.DEFAULT_PROTOCOL)  # type: ignore[return-value]

    def planned(data: TensorWriteData) -> _Reduced:
        note(data.properties, data.size, data.chunk.sizes)
        return data.__reduce_ex__(pickle.DEFAULT_PROTOCOL)  # type: ignore[return-value]

    def note(properties: Any, size: Sequence[int], shard: Sequence[int] | None) -> None:
        strides = getattr(properties, "strides", None)
        if strides is None or _is_row_major(strides, size) or (shard is not None and _is_row_major(strides, shard)):
            row_major.add(id(properties))

    def properties_(properties: TensorProperties) -> _Reduced:
        reduced: Any = properties.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        make, args, state, *rest = reduced
        return make, args, state[:_FIELDS] if id(properties) in row_major else state, *rest

    # Called by a pickler for instances of exactly these classes.
    pickler.dispatch_table = copyreg.dispatch_table | {
        TensorStorageMetadata: stored,
        TensorWriteData: planned,
        TensorProperties: properties_,
    }
    pickler.dump(metadata)
    return buffer.getvalue()


def _is_row_major(strides: Sequence[int], size: Sequence[int]) -> bool:
    if len(strides) != len(size):
        return False
    expected = 1
    for stride, extent in zip(reversed(strides), reversed(size), strict=True):
        if extent != 1 and stride != expected:
            return 0 in size  # an empty tensor has no strides to speak of
        expected *= extent
    return True

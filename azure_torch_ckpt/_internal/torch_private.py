"""Every private name of torch that this package uses, each with the reason why a public one does not suffice."""

from __future__ import annotations

# Undoes what `FileSystemWriter(_extensions=...)` did to a stream. Experimental in torch; nothing else can read such a
# stream.
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension

# The mark that torch's writer leaves in `Metadata.version`. Not underscored, but not exported either.
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION as CURRENT_DCP_VERSION

# What torch's readers expect as the values of `Metadata.storage_data`: they read its `relative_path`, `offset`,
# `length` and `transform_descriptors`. A class of ours in the pickle would lock torch's readers out.
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo

# `TensorProperties` pickles its memory format as a member of this enum, so every `.metadata` names it.
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as MemoryFormatEncoding

# The chunks of a tensor that this rank has, for tensors of every class; torch's own planners use it.
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list as create_chunk_list

# The store of the default process group: by it the ranks of a save without collectives agree on an id, without waiting
# for each other. torch hands it to nobody, and a group that was made by `init_method` has no other way to it.
from torch.distributed.distributed_c10d import _get_default_store as get_default_store

__all__ = [
    "CURRENT_DCP_VERSION",
    "ExtensionRegistry",
    "MemoryFormatEncoding",
    "StorageInfo",
    "StreamTransformExtension",
    "create_chunk_list",
    "get_default_store",
]

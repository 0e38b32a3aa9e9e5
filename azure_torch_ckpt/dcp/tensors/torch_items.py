"""Items that only torch can take apart: pickled objects, and tensors whose raw bytes nobody wrote the place of."""

from __future__ import annotations

import io
import warnings
from typing import IO

import torch

from azure_torch_ckpt._internal.torch_private import ExtensionRegistry, StreamTransformExtension
from azure_torch_ckpt.errors import CorruptCheckpointError, UnsupportedCheckpointError

__all__ = ["load_tensor", "open_item"]


def open_item(received: bytearray, transforms: tuple[str, ...], what: str) -> io.BytesIO:
    """An item's bytes as a stream, the transforms that it was written through undone.

    Raises:
        UnsupportedCheckpointError: a transform is not known here.
        CorruptCheckpointError: a transform cannot make sense of the bytes.
    """
    if not transforms:
        return io.BytesIO(received)
    try:
        extensions = ExtensionRegistry().from_descriptor_list(transforms)
    except (KeyError, ValueError) as error:
        raise UnsupportedCheckpointError(
            f"{what} was written through the stream transforms {', '.join(transforms)}, which torch "
            f"{torch.__version__} does not bring. Load it with the code that saved it"
        ) from error
    stream: IO[bytes] = io.BytesIO(received)
    try:
        for extension in extensions:
            if isinstance(extension, StreamTransformExtension):
                stream = extension.transform_from(stream)
        return io.BytesIO(stream.read())
    except ImportError as error:
        raise UnsupportedCheckpointError(
            f"{what} was written through the stream transforms {', '.join(transforms)}: {error}"
        ) from error
    except Exception as error:
        raise CorruptCheckpointError(f"{what} cannot be read through {', '.join(transforms)}: {error}") from error


def load_tensor(stream: IO[bytes], what: str) -> torch.Tensor:
    """The tensor that torch.save wrote, on the CPU.

    Raises:
        UnsupportedCheckpointError: it is of a class that torch does not load without being told that it is safe.
        CorruptCheckpointError: the bytes are no saved tensor.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of typed storages and experimental dtypes: whoever saved it was told
            tensor = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights_only" in str(error).lower() or "Unsupported global" in str(error):
            raise UnsupportedCheckpointError(
                f"{what} is of a class that torch.load takes for unsafe. If you trust the checkpoint, name the class "
                f"with torch.serialization.add_safe_globals first ({str(error).splitlines()[0]})"
            ) from error
        raise CorruptCheckpointError(f"{what} is no tensor that torch.load can read: {error}") from error
    if not isinstance(tensor, torch.Tensor):
        raise CorruptCheckpointError(f"{what} holds {type(tensor).__name__}, not a tensor")
    return tensor

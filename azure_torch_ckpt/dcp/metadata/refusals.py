"""`Refusals`: the errors for a pickle that is not a ``.metadata``, is of a newer torch, or was made to do harm."""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import NoReturn

import torch

from azure_torch_ckpt.dcp.metadata.foreign_classes import ForeignClass
from azure_torch_ckpt.dcp.metadata.vocabulary import Known, quote
from azure_torch_ckpt.errors import CorruptCheckpointError, UnsafeMetadataError, UnsupportedCheckpointError

__all__ = ["Refusals"]


@dataclass(frozen=True, slots=True)
class Refusals:
    """Raises the errors for one pickle of `length` bytes, which `where` names in messages."""

    where: str
    length: int

    def corrupt(self, pos: int, reason: str, cause: BaseException | None = None) -> NoReturn:
        raise CorruptCheckpointError(
            f"{self.where} is not readable as checkpoint metadata: {reason[:300]} (at byte {pos} of "
            f"{self.length}). It is cut short, damaged or not a .metadata; restore it or use another checkpoint."
        ) from cause

    def refuse_opcode(self, op: int, pos: int) -> NoReturn:
        name = next((known.name for known in pickletools.opcodes if ord(known.code) == op), None)
        if name is None:
            self.corrupt(pos, f"byte 0x{op:02x} is not a pickle opcode")
        raise UnsafeMetadataError(
            f"{self.where} uses the pickle opcode {name} at byte {pos}, which metadata never needs. It is "
            "damaged or was made to do harm; nothing of it was run. Use another checkpoint."
        )

    def refuse_use(self, target: object, verb: str) -> NoReturn:
        what = target.name if type(target) is Known else f"an object of type {type(target).__name__}"
        raise UnsafeMetadataError(
            f"{self.where} {verb} {what} in a way that metadata never does. It is damaged or was made to do harm; "
            "that was not done. Use another checkpoint."
        )

    def refuse_class(self, found: ForeignClass) -> NoReturn:
        name = f"{found.module}.{found.name}"
        if found.is_newer:
            self.refuse_newer(name)
        self.refuse_name(name)

    def refuse_newer(self, name: str) -> NoReturn:
        raise UnsupportedCheckpointError(
            f"{self.where} names {quote(name)}, which torch {torch.__version__} does not have: it was written by a "
            "newer torch. Upgrade torch."
        )

    def refuse_name(self, name: str) -> NoReturn:
        raise UnsafeMetadataError(
            f"{self.where} names {quote(name)}, which is not part of a checkpoint's metadata; to load it would run "
            "code that the writer of the blob has chosen. It was not run. If your own planner put it there and you "
            "trust the checkpoint, register it with torch.serialization.add_safe_globals before you load (names under "
            "torch, os and sys cannot be registered); otherwise use another checkpoint."
        )

"""Acts for `test_commit_faults.py`: saves, removals and clean-ups, and what must hold after each.

The rule: whatever happens to an act's requests, the checkpoint is the old one or the new one, whole. An act that
returned was carried out. An act that raised was not, unless its error says that this is unknown.
"""

from __future__ import annotations

import contextlib
import datetime
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from azure_torch_ckpt import (
    AzureBlobHuggingFaceReader,
    AzureBlobHuggingFaceWriter,
    AzureBlobReader,
    AzureBlobWriter,
    BlobLocation,
    CheckpointNotFoundError,
    CommitUnknownError,
    TransferOptions,
    prune,
    remove_checkpoint,
)
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.errors import AzureCheckpointError, CheckpointReplacedError, CommitConflictError
from azure_torch_ckpt.huggingface.index import parse_index

OLD, NEW, OTHER, NEXT = 0, 1, 2, 3
NO_GRACE = datetime.timedelta(0)
# One request after the other, so that the k-th is the same one in every run.
IN_TURN = TransferOptions(concurrency=1)


class Act(ABC):
    """Changes what is at `url`; also does the same as another process would.

    Args:
        container: URL of a container that no other act uses.
    """

    name: str
    first: int | None = OLD  # the version that is there before

    def __init__(self, container: str, credential: Any) -> None:
        self.container = container
        self.url = f"{container}/run/step-1"
        self.access = {"credential": credential, "options": IN_TURN}

    def prepare(self) -> None:
        if self.first is not None:
            self.save(self.url, self.first)

    @abstractmethod
    def begin(self) -> None:
        """Make the objects that one process keeps from one act to the next."""

    @abstractmethod
    def run(self) -> object: ...

    def check(self, error: BaseException | None, killed: bool, others: bool) -> str:
        """Assert the rule; return a text about what is there.

        Args:
            error: that `run` raised.
            killed: the process was killed, so that `run` returned nothing and raised nothing.
            others: another save or removal was carried out meanwhile.
        """
        now = self.version(self.url)
        allowed = {self.first, *self.made} | ({OTHER, None} if others else set())
        assert now in allowed, f"version {now} is there"
        if killed:
            return self.summary(now)
        if error is None:
            assert now in self.made or others, f"it returned, and {now} is there"
        else:
            error = error.failures[0][0] if isinstance(error, CheckpointException) else error
            assert isinstance(error, AzureCheckpointError), repr(error)
            if not isinstance(error, CommitUnknownError):
                assert now not in self.made - {self.first} or others, f"{now} is there in spite of {error!r}"
            if isinstance(error, (CommitConflictError, CheckpointReplacedError)):
                assert others, repr(error)
        unknown = isinstance(error, CommitUnknownError)
        return f"{self.summary(now)}{', unknown to the caller' if unknown else '' if error is None else ', an error'}"

    made: frozenset[int | None]  # versions that may be there after the act was carried out

    def summary(self, version: int | None) -> str:
        return {OLD: "old whole", NEW: "new whole", OTHER: "the other's whole", None: "none"}[version]

    def check_recovery(self) -> None:
        """Assert that a save succeeds, by the same writer if there is one, and that prune removes leftovers only."""
        self.save_next()
        assert self.version(self.url) == NEXT
        prune(self.container, grace=NO_GRACE, dry_run=False, **self.access)
        assert self.version(self.url) == NEXT
        assert set(self.blobs()) == set(self.live(self.url))

    def other_saves(self) -> None:
        self.save(self.url, OTHER)

    def other_removes(self) -> None:
        self.remove()

    # What is there

    def blobs(self) -> Iterator[str]:
        return (blob.path for blob in self.store().list(""))

    def store(self) -> BlobStore:
        return BlobStore(BlobLocation.parse(self.container), Access(self.access["credential"]))

    def save_next(self) -> None:
        self.save(self.url, NEXT)

    def save(self, url: str, version: int) -> None:
        dcp.save(_state(version), storage_writer=AzureBlobWriter(url, **self.access), no_dist=True)

    def remove(self) -> None:
        with contextlib.suppress(CheckpointNotFoundError):
            remove_checkpoint(self.url, **self.access)

    def version(self, url: str) -> int | None:
        """The version that loads, bit for bit; None where there is none."""
        loaded: dict[str, Any] = {**{name: torch.zeros(3) for name in _NAMES}, "version": None}
        try:
            dcp.load(loaded, storage_reader=AzureBlobReader(url, **self.access), no_dist=True)
        except CheckpointException as caught:
            error, _ = caught.failures[0]
            if isinstance(error, CheckpointNotFoundError):
                return None
            raise error from caught
        version: int = loaded["version"]
        for name in _NAMES:
            assert torch.equal(loaded[name], _state(version)[name]), f"{name} is not what version {version} had"
        return version

    def live(self, url: str) -> Iterator[str]:
        prefix = BlobLocation.parse(url).path
        yield f"{prefix}/.metadata"
        metadata = AzureBlobReader(url, **self.access).read_metadata()
        yield from {f"{prefix}/{info.relative_path}" for info in metadata.storage_data.values()}


_NAMES = ("weight", "bias")


def _state(version: int) -> dict[str, Any]:
    return {**{name: torch.full((3,), version + 1.0) for name in _NAMES}, "version": version}


class OverwritingSave(Act):
    name = "overwriting save"
    made = frozenset({NEW})

    def begin(self) -> None:
        self._writer = AzureBlobWriter(self.url, **self.access)

    def run(self) -> object:
        return dcp.save(_state(NEW), storage_writer=self._writer, no_dist=True)

    def save_next(self) -> None:
        dcp.save(_state(NEXT), storage_writer=self._writer, no_dist=True)


class FirstSave(OverwritingSave):
    name = "first save"
    first = None


class Removal(Act):
    name = "removal"
    made = frozenset({None})

    def begin(self) -> None:
        pass

    def run(self) -> object:
        return remove_checkpoint(self.url, **self.access)


class Prune(Act):
    """Removes one checkpoint of two, and leftovers beside the other one."""

    name = "prune"
    made = frozenset({OLD, None})  # either: prune keeps a checkpoint where it cannot tell

    def __init__(self, container: str, credential: Any) -> None:
        super().__init__(container, credential)
        self._stays = f"{self.container}/run/step-2"

    def prepare(self) -> None:
        super().prepare()
        self.save(self._stays, OLD)
        self.store().put(f"{BlobLocation.parse(self._stays).path}/{'ab' * 16}/__0_0.distcp", b"left over")

    def begin(self) -> None:
        pass

    def run(self) -> object:
        return prune(self.container, keep_last=1, grace=NO_GRACE, dry_run=False, **self.access)

    def check(self, error: BaseException | None, killed: bool, others: bool) -> str:
        result = super().check(error, killed, others)
        assert self.version(self._stays) == OLD
        return result

    def check_recovery(self) -> None:
        self.run()
        assert self.version(self._stays) == OLD
        # A checkpoint that was saved meanwhile is young, so prune may keep it.
        keeps = [self._stays] + ([self.url] if self.version(self.url) == OTHER else [])
        assert set(self.blobs()) == {path for url in keeps for path in self.live(url)}


class OverwritingModelSave(Act):
    """In the HuggingFace layout."""

    name = "overwriting save of a model"
    made = frozenset({NEW})

    def begin(self) -> None:
        self._writer = self._make()

    def run(self) -> object:
        self._save(self._writer, NEW)
        return None

    def save_next(self) -> None:
        self._save(self._writer, NEXT)

    def save(self, url: str, version: int) -> None:
        self._save(self._make(), version)

    def remove(self) -> None:
        index = f"{BlobLocation.parse(self.url).path}/model.safetensors.index.json"
        self.store().delete(index)

    def _make(self) -> AzureBlobHuggingFaceWriter:
        return AzureBlobHuggingFaceWriter(self.url, overwrite=True, **self.access)

    def _save(self, writer: AzureBlobHuggingFaceWriter, version: int) -> None:
        tensors = {name: _state(version)[name] for name in _NAMES}
        dcp.save(tensors, storage_writer=writer, no_dist=True)

    def version(self, url: str) -> int | None:
        loaded = {name: torch.zeros(3) for name in _NAMES}
        reader = AzureBlobHuggingFaceReader(url, **self.access)
        try:
            dcp.load(loaded, storage_reader=reader, no_dist=True)
        except CheckpointException as caught:
            error, _ = caught.failures[0]
            if isinstance(error, CheckpointNotFoundError):
                return None
            raise error from caught
        [value] = {float(number) for tensor in loaded.values() for number in tensor}
        return round(value) - 1

    def live(self, url: str) -> Iterator[str]:
        prefix = BlobLocation.parse(url).path
        data, _ = self.store().read(f"{prefix}/model.safetensors.index.json", limit=1 << 20)
        yield f"{prefix}/model.safetensors.index.json"
        yield from {f"{prefix}/{name}" for name in parse_index(data, "index").files.values()}


class FirstModelSave(OverwritingModelSave):
    name = "first save of a model"
    first = None


ACTS = (FirstSave, OverwritingSave, Removal, Prune, FirstModelSave, OverwritingModelSave)

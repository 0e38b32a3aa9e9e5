"""A checkpoint storage that stores nothing: what is left is the cost of torch.distributed.checkpoint itself."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future


class NullStorage:
    """Remembers the metadata of what was saved at each path, and nothing else."""

    def __init__(self) -> None:
        self._metadata: dict[str, Metadata] = {}

    def writer(self, path: str) -> StorageWriter:
        return _NullWriter(self._metadata, path)

    def reader(self, path: str) -> StorageReader:
        return _NullReader(self._metadata[path])


class _NullWriter(StorageWriter):
    """Asks the planner for every item's data, as each writer must."""

    def __init__(self, saved: dict[str, Metadata], path: str) -> None:
        self._saved = saved
        self._path = path

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for item in plan.items:
            planner.resolve_data(item)
            results.append(WriteResult(index=item.index, size_in_bytes=0, storage_data=None))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {result.index: result.storage_data for rank in results for result in rank}
        self._saved[self._path] = metadata

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _NullReader(StorageReader):
    """Asks the planner for every item's destination, as each reader must, and leaves it as it is."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            planner.commit_tensor(item, planner.resolve_tensor(item))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

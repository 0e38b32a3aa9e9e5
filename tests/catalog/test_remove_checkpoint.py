"""`remove_checkpoint` deletes the blobs of one checkpoint, its metadata first, and nothing else."""

from __future__ import annotations

import datetime

import pytest
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import (
    AzureBlobReader,
    AzureBlobWriter,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    CorruptCheckpointError,
    TransferOptions,
    prune,
    remove_checkpoint,
)
from tests.faults.tally import Tally
from tests.support.containers import paths_below, plant_leftovers, put
from tests.support.faults import Answer, Call
from tests.support.mixed_checkpoint import KEY, assert_right, data_path, load, save, save_without_collectives
from tests.support.proxy import FaultProxy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def test_remove_takes_the_metadata_first_and_leaves_the_rest(
    proxy: FaultProxy, container: str, proxied_container: str
) -> None:
    save(f"{container}/a", 1)
    save(f"{container}/a/inner", 2)
    put(container, "a/notes.txt")
    leftovers = plant_leftovers(container, "a")
    inner = paths_below(f"{container}/a/inner")
    data = data_path(f"{container}/a")
    remove_checkpoint(f"{proxied_container}/a", credential=KEY)
    deleted = [seen.path.partition(f"/{container.rpartition('/')[2]}/")[2] for seen in proxy.requests("Delete")]
    assert deleted == ["a/.metadata", data]
    assert sorted(paths_below(container)) == sorted([*inner, "a/notes.txt", *leftovers])
    assert_right(load(f"{container}/a/inner"), 2)
    with pytest.raises(CheckpointNotFoundError):
        remove_checkpoint(f"{container}/a", credential=KEY)


def test_remove_of_an_empty_state_dict_and_of_ranks_without_collectives(container: str) -> None:
    dcp.save({}, storage_writer=AzureBlobWriter(f"{container}/empty", credential=KEY))
    save_without_collectives(f"{container}/alone", 0, 1, 2)
    assert len(paths_below(f"{container}/alone")) == 6
    for name in ("empty", "alone"):
        remove_checkpoint(f"{container}/{name}", credential=KEY)
    assert paths_below(container) == []


def test_a_checkpoint_that_was_replaced_meanwhile_stays(
    proxy: FaultProxy, container: str, proxied_container: str, tally: Tally
) -> None:
    save(f"{container}/a", 1)
    proxy.when("Delete").do(Call(lambda: save(f"{container}/a", 2), "request"))
    with pytest.raises(CheckpointReplacedError, match="replaced"):
        remove_checkpoint(f"{proxied_container}/a", credential=KEY)
    assert_right(load(f"{container}/a"), 2)
    assert len(paths_below(container)) == 2
    tally.add("checkpoint replaced while it is removed", 1, "clear error, the new one stands", 1)


def test_metadata_that_cannot_be_read_is_not_removed(container: str) -> None:
    save(f"{container}/a")
    put(container, "a/.metadata", b"garbage")
    before = paths_below(container)
    with pytest.raises(CorruptCheckpointError):
        remove_checkpoint(f"{container}/a", credential=KEY)
    assert paths_below(container) == before


def test_data_that_could_not_be_removed_is_what_prune_finds(
    proxy: FaultProxy, container: str, proxied_container: str
) -> None:
    save(f"{container}/a")
    data = data_path(f"{container}/a")
    proxy.when("Delete", nth=2, times=None).do(Answer(403, "AuthorizationFailure"))
    remove_checkpoint(f"{proxied_container}/a", credential=KEY, options=TransferOptions(retry_seconds=0))
    assert paths_below(container) == [data]
    with pytest.raises(CheckpointNotFoundError):
        AzureBlobReader(f"{container}/a", credential=KEY).read_metadata()
    [found] = prune(container, credential=KEY, grace=datetime.timedelta(0), dry_run=False).remains
    assert found.blobs == [data]
    assert paths_below(container) == []

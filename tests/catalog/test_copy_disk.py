"""`copy` between a container and a disk: whole files or none, torch loads them, and nothing is moved twice."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import (
    AzureBlobReader,
    AzureBlobWriter,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CommitConflictError,
    CorruptCheckpointError,
    TransferOptions,
)
from azure_torch_ckpt.catalog import copy, list_checkpoints, verify
from azure_torch_ckpt.catalog.copying.trees import FolderTree
from azure_torch_ckpt.errors import LocalFileError
from azure_torch_ckpt.progress import Progress
from tests.catalog.catalog_process import start
from tests.support.containers import content, paths_below, put, store_of
from tests.support.faults import Call, Flip, Gate, Hold, Kill
from tests.support.mixed_checkpoint import (
    KEY,
    SMALL,
    assert_right,
    flip_in_storage,
    item_of,
    load,
    save,
    save_without_collectives,
    zeros,
)
from tests.support.proxy import FaultProxy, meet

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def load_from(folder: Path) -> dict[str, Any]:
    loaded = zeros()
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(folder))
    return loaded


# ---- to a disk -------------------------------------------------------------------------------------------------------


def test_torch_loads_the_copy(proxy: FaultProxy, container: str, proxied_container: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save(f"{container}/run/step-{step}", step)
    put(container, "run/step-1/notes.txt", b"")
    reports: list[Progress] = []
    meet(proxy, 2, lambda seen: seen.kind == "Get Blob" and seen.path.endswith(".distcp"))
    report = copy(
        f"{proxied_container}/run",
        tmp_path / "new" / "folder",
        credential=KEY,
        options=SMALL,
        progress=reports.append,
    )
    for step in (1, 2):
        assert_right(load_from(tmp_path / "new" / "folder" / f"step-{step}"), step)
    names = [path.removeprefix("run/") for path in paths_below(container)]
    assert files_below(tmp_path / "new" / "folder") == sorted(names)
    assert (report.blobs, report.skipped) == (5, 0)
    sizes = [(tmp_path / "new" / "folder" / name).stat().st_size for name in names]
    assert report.bytes == sum(sizes)
    metadata_bytes = sum(size for name, size in zip(names, sizes, strict=True) if name.endswith(".metadata"))
    assert reports[-1].done == reports[-1].total == report.bytes - metadata_bytes


def test_the_folders_of_a_hierarchical_namespace_are_not_copied_as_files(container: str, tmp_path: Path) -> None:
    save(f"{container}/run/step-1", 1)
    folder = item_of(f"{container}/run/step-1", "large").relative_path.partition("/")[0]
    for path in ("run", "run/step-1", f"run/step-1/{folder}"):
        put(container, path, b"")
    assert copy(f"{container}/run", tmp_path, credential=KEY).blobs == 2
    assert_right(load_from(tmp_path / "step-1"), 1)


def test_what_is_there_and_right_is_not_fetched_again(
    proxy: FaultProxy, container: str, proxied_container: str, tmp_path: Path
) -> None:
    save(f"{container}/a", 1)
    for verify_ in (True, False):
        copy(f"{container}/a", tmp_path, credential=KEY)
        proxy.log.clear()
        report = copy(f"{proxied_container}/a", tmp_path, credential=KEY, verify=verify_)
        assert (report.blobs, report.skipped) == (0, 2)
        assert [seen.kind for seen in proxy.log] == ["List", "Get Blob"]
    [data] = [tmp_path / name for name in files_below(tmp_path) if name.endswith(".distcp")]
    damaged = bytearray(data.read_bytes())
    damaged[2000] ^= 1
    times = data.stat()
    data.write_bytes(damaged)
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (
        copy(f"{container}/a", tmp_path, credential=KEY, verify=False).skipped == 2
    )  # without verify, size and time decide
    assert copy(f"{container}/a", tmp_path, credential=KEY).blobs == 1
    assert_right(load_from(tmp_path), 1)


@pytest.mark.parametrize("at", ["first", "middle", "last"])
def test_a_copy_that_is_killed_leaves_no_checkpoint_and_continues(
    proxy: FaultProxy, container: str, proxied_container: str, tmp_path: Path, at: str
) -> None:
    save_without_collectives(f"{container}/a", 0, 1, 2)
    call = "copy(*args[:2], credential=args[2], options=TransferOptions(concurrency=1))"
    child = start(call, f"{proxied_container}/a", tmp_path, KEY)
    nth = {"first": 1, "middle": 2, "last": 3}[at]
    proxy.when(lambda seen: seen.method == "GET" and seen.path.endswith(".distcp"), nth=nth).do(
        Kill(child.pid, 10 if at == "middle" else "request")
    )
    child.communicate(b"\n", timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert not any(name.endswith("metadata") for name in files_below(tmp_path))
    report = copy(f"{container}/a", tmp_path, credential=KEY)
    assert report.skipped == nth - 1 and report.blobs == 6 - (nth - 1)
    assert not any(name.endswith(".part") for name in files_below(tmp_path))
    assert len(files_below(tmp_path)) == 6


def test_an_interrupt_leaves_nothing_half_done(
    proxy: FaultProxy, container: str, proxied_container: str, tmp_path: Path
) -> None:
    save(f"{container}/a", 1)
    child = start("copy(*args[:2], credential=args[2])", f"{proxied_container}/a", tmp_path, KEY)
    proxy.when(lambda seen: seen.method == "GET" and seen.path.endswith(".distcp")).do(
        Call(lambda: child.send_signal(signal.SIGINT), 1000), Hold(Gate(), 2000)
    )
    _, said = child.communicate(b"\n", timeout=60)
    assert child.returncode == -signal.SIGINT and b"KeyboardInterrupt" in said
    assert files_below(tmp_path) == []


def test_damage_in_transit_or_in_storage_leaves_nothing_visible(
    proxy: FaultProxy, container: str, proxied_container: str, tmp_path: Path
) -> None:
    save(f"{container}/a", 1)
    proxy.when(lambda seen: seen.method == "GET" and seen.path.endswith(".distcp")).do(Flip(3000))
    with pytest.raises(CorruptCheckpointError, match="in transit"):
        copy(f"{proxied_container}/a", tmp_path, credential=KEY)
    assert files_below(tmp_path) == []
    flip_in_storage(f"{container}/a", item_of(f"{container}/a", "object"), 50)
    with pytest.raises(CorruptCheckpointError):
        copy(f"{container}/a", tmp_path, credential=KEY)
    assert files_below(tmp_path) == []


def test_a_part_that_another_copy_is_writing_is_left_alone(container: str, tmp_path: Path) -> None:
    save(f"{container}/a", 1)
    busy, left = tmp_path / ".x.0123456789abcdef.part", tmp_path / ".y.0123456789abcdef.part"
    left.write_bytes(b"1")
    with busy.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        copy(f"{container}/a", tmp_path, credential=KEY)
        assert busy.exists() and not left.exists()
    copy(f"{container}/a", tmp_path, credential=KEY)
    assert not busy.exists()


def test_a_source_is_not_changed(container: str, tmp_path: Path) -> None:
    """The temporary files of an earlier copy stay, and are not copied."""
    save(f"{container}/a", 1)
    copy(f"{container}/a", tmp_path, credential=KEY)
    part = tmp_path / ".x.0123456789abcdef.part"
    part.write_bytes(b"1")
    before = files_below(tmp_path)
    copy(tmp_path, f"{container}/b", credential=KEY)
    assert files_below(tmp_path) == before and part.read_bytes() == b"1"
    assert sorted(paths_below(f"{container}/b")) == sorted(
        "b/" + path.removeprefix("a/") for path in paths_below(f"{container}/a")
    )


def test_another_checkpoint_in_the_folder_is_replaced_only_on_request(container: str, tmp_path: Path) -> None:
    save(f"{container}/a", 1)
    save(f"{container}/b", 2)
    copy(f"{container}/a", tmp_path, credential=KEY)
    with pytest.raises(CheckpointExistsError):
        copy(f"{container}/b", tmp_path, credential=KEY)
    assert_right(load_from(tmp_path), 1)
    copy(f"{container}/b", tmp_path, credential=KEY, overwrite=True)
    assert_right(load_from(tmp_path), 2)
    assert len(files_below(tmp_path)) == 2


def test_metadata_that_another_process_wrote_meanwhile_stays(
    proxy: FaultProxy, container: str, proxied_container: str, tmp_path: Path
) -> None:
    save(f"{container}/a", 1)
    proxy.when(lambda seen: seen.path.endswith(".distcp")).do(
        Call(lambda: (tmp_path / ".metadata").write_bytes(b"theirs"), "request")
    )
    with pytest.raises(CommitConflictError):
        copy(f"{proxied_container}/a", tmp_path, credential=KEY)
    assert (tmp_path / ".metadata").read_bytes() == b"theirs"


def test_errors_of_the_disk_are_ours(container: str, tmp_path: Path) -> None:
    save(f"{container}/a", 1)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LocalFileError, match="file"):
        copy(f"{container}/a", tmp_path / "file", credential=KEY)
    with pytest.raises(LocalFileError, match="free space"):
        FolderTree(tmp_path / "not" / "there").check_free_space(1 << 60)


# ---- from a disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(container: str, tmp_path: Path) -> Iterator[Path]:
    """Checkpoints of ours, and one by torch, in a folder."""
    for step in (1, 2):
        save(f"{container}/source/step-{step}", step)
    copy(f"{container}/source", tmp_path, credential=KEY)
    dcp.save({"x": torch.arange(1000)}, storage_writer=dcp.FileSystemWriter(tmp_path / "torch"))
    yield tmp_path


def test_a_folder_becomes_checkpoints_and_a_second_time_nothing_moves(
    proxy: FaultProxy, container: str, proxied_container: str, on_disk: Path
) -> None:
    report = copy(str(on_disk), f"{proxied_container}/up", credential=KEY, options=SMALL)
    assert [entry.name for entry in list_checkpoints(f"{container}/up", credential=KEY)] == [
        "step-1",
        "step-2",
        "torch",
    ]
    for step in (1, 2):
        assert_right(load(f"{container}/up/step-{step}"), step)
    loaded = {"x": torch.zeros(1000, dtype=torch.int64)}
    dcp.load(loaded, storage_reader=AzureBlobReader(f"{container}/up/torch", credential=KEY))
    assert torch.equal(loaded["x"], torch.arange(1000))
    assert report.bytes == sum((on_disk / name).stat().st_size for name in files_below(on_disk))
    assert {seen.path.rpartition("/")[2] for seen in proxy.requests("Put Blob")} == {".metadata"}

    proxy.log.clear()
    again = copy(on_disk, f"{proxied_container}/up", credential=KEY)
    assert (again.blobs, again.skipped) == (0, report.blobs)
    assert {seen.kind for seen in proxy.log} == {"List", "Get Blob"}
    assert all(seen.path.endswith(".metadata") for seen in proxy.requests("Get Blob"))


def test_an_interrupted_upload_continues_with_what_is_missing(container: str, on_disk: Path) -> None:
    report = copy(on_disk, f"{container}/up", credential=KEY)
    paths = paths_below(f"{container}/up")
    store = store_of(container)
    for path in paths:
        if path.endswith(".metadata") or "step-2" in path:
            store.delete(path)
    again = copy(on_disk, f"{container}/up", credential=KEY)
    assert again.skipped == 2 and again.blobs == report.blobs - 2
    assert paths_below(f"{container}/up") == paths
    # A blob of the same size with other content is not a copy.
    [data] = [path for path in paths if path.startswith("up/torch/__0_0")]
    put(container, data, b"x" * len(content(container, data)))
    assert copy(on_disk, f"{container}/up", credential=KEY).blobs == 1
    assert content(container, data) == (on_disk / data.removeprefix("up/")).read_bytes()


def test_a_damaged_file_is_not_uploaded(container: str, on_disk: Path) -> None:
    [data] = [on_disk / name for name in files_below(on_disk) if name.startswith("step-1/") and "distcp" in name]
    damaged = bytearray(data.read_bytes())
    damaged[3000] ^= 1
    data.write_bytes(damaged)
    with pytest.raises(CorruptCheckpointError, match="step-1"):
        copy(on_disk / "step-1", f"{container}/one", credential=KEY)
    assert paths_below(f"{container}/one") == []
    data.write_bytes(damaged[:-1])
    with pytest.raises(CorruptCheckpointError, match="bytes long"):
        copy(on_disk / "step-1", f"{container}/one", credential=KEY)


def test_a_folder_without_a_checkpoint(container: str, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointNotFoundError, match="No save"):
            copy(folder, container, credential=KEY)


def test_a_large_file_takes_no_more_memory_than_the_budget(container: str, tmp_path: Path) -> None:
    options = TransferOptions(memory_budget=8 << 20, concurrency=4)
    state = {"x": torch.arange(8 << 20, dtype=torch.int32)}  # 32 MiB
    dcp.save(state, storage_writer=AzureBlobWriter(f"{container}/a", credential=KEY))
    import tracemalloc

    for src, dst in ((f"{container}/a", tmp_path / "a"), (tmp_path / "a", f"{container}/b")):
        tracemalloc.start()
        try:
            copy(src, dst, credential=KEY, options=options)
            assert tracemalloc.get_traced_memory()[1] < 12 << 20
        finally:
            tracemalloc.stop()
    assert verify(f"{container}/b", credential=KEY).ok

"""The package in an account with a hierarchical namespace, by its double: nothing fails, no empty directory is left."""

from __future__ import annotations

import datetime
import itertools
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import (
    AzureBlobHuggingFaceReader,
    AzureBlobHuggingFaceWriter,
    AzureBlobReader,
    AzureBlobWriter,
    BlobDataset,
    BlobIO,
    IterableBlobDataset,
    prune,
    remove_checkpoint,
    verify,
)
from azure_torch_ckpt.catalog import copy, latest, list_checkpoints
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.errors import CheckpointNotFoundError, RequestRefusedError
from azure_torch_ckpt.filesystem import AzureBlobFileSystem
from azure_torch_ckpt.transport.buffers import Gather
from tests.faults.tally import Tally
from tests.support.containers import KEY, put, store_of
from tests.support.faults import Cut
from tests.support.hierarchical import HierarchicalAccount
from tests.support.proxy import FaultProxy


def state(value: float) -> dict[str, Any]:
    return {"weight": torch.full((300, 40), value), "step": int(value)}


def save(url: str, value: float) -> None:
    dcp.save(state(value), storage_writer=AzureBlobWriter(url, credential=KEY), no_dist=True)


def load(url: str) -> float:
    into = state(0)
    dcp.load(into, storage_reader=AzureBlobReader(url, credential=KEY), no_dist=True)
    assert bool((into["weight"] == into["weight"][0, 0]).all())
    return float(into["weight"][0, 0])


def names(hierarchical: HierarchicalAccount, url: str) -> list[str]:
    """What lies in the container, save ids as ``*``."""
    return ["/".join("*" if len(part) == 32 else part for part in path.split("/")) for path in hierarchical.paths(url)]


def test_save_load_replace_verify_remove(directories: str, hierarchical: HierarchicalAccount) -> None:
    url = f"{directories}/run/step-1"
    save(url, 1)
    assert load(url) == 1
    there = ["run/", "run/step-1/", "run/step-1/*/", "run/step-1/*/__0_0.distcp", "run/step-1/.metadata"]
    assert sorted(names(hierarchical, url)) == sorted(there)
    save(url, 2)  # what it replaces leaves no directory
    assert load(url) == 2
    assert sorted(names(hierarchical, url)) == sorted(there)
    assert verify(url, credential=KEY).ok
    remove_checkpoint(url, credential=KEY)
    assert names(hierarchical, url) == ["run/"]


@pytest.mark.parametrize("lost", ["the request", "the answer"])
def test_no_directory_is_left_where_one_request_is_lost(
    directories: str, hierarchical: HierarchicalAccount, tally: Tally, lost: str
) -> None:
    """Of an overwriting save and of a removal, each request in turn: it is sent again."""
    outcomes: Counter[str] = Counter()
    container = directories.rpartition("/")[2]
    for number in itertools.count(1):
        with FaultProxy(hierarchical.endpoint) as proxy:
            url = f"{proxy.endpoint}/{container}/step-{number}"
            save(f"{directories}/step-{number}", 1)
            fault = proxy.when(lambda seen: True, nth=number)
            fault.do(Cut("request" if lost == "the request" else "answer"))
            save(url, 2)
            between = hierarchical.paths(directories)
            assert len([path for path in between if path.endswith(".distcp")]) == 1
            assert len([path for path in between if path.endswith("/")]) == 2  # of the checkpoint and of its save
            assert load(f"{directories}/step-{number}") == 2
            remove_checkpoint(url, credential=KEY)
            assert hierarchical.paths(directories) == []
            if fault.seen < number:
                break
        outcomes["healed, no directory left"] += 1
    assert outcomes.total() > 12
    tally.add_all(f"hierarchical namespace: overwriting save and removal, {lost} lost, each request", outcomes)


def test_prune_leaves_no_directory(directories: str, hierarchical: HierarchicalAccount) -> None:
    for step in (1, 2, 3):
        save(f"{directories}/run/step-{step}", step)
    store = store_of(directories)
    store.put(f"run/step-0/{'0' * 32}/__0_0.distcp", b"of a save that failed")
    store.put(f"run/step-3/{'1' * 32}/__0_0.distcp", b"of a save that failed")
    report = prune(f"{directories}/run", keep_last=1, grace=datetime.timedelta(0), dry_run=False, credential=KEY)
    assert (len(report.removed), len(report.remains)) == (2, 2)
    kept = ["run/", "run/step-3/", "run/step-3/*/", "run/step-3/*/__0_0.distcp", "run/step-3/.metadata"]
    assert sorted(names(hierarchical, directories)) == sorted(kept)


def test_prune_removes_the_directories_of_saves_that_stored_nothing(
    directories: str, hierarchical: HierarchicalAccount
) -> None:
    """A block makes its blob's directory, and if the save is killed then, nothing else does."""
    save(f"{directories}/run/step-1", 1)
    store = store_of(directories)
    for folder in (f"run/step-1/{'0' * 32}", f"run/step-2/{'1' * 32}"):
        store.stage_block(f"{folder}/__0_0.distcp", "0001", Gather([memoryview(b"data")]))
    store.put("run/notes/x", b"")
    store.delete("run/notes/x")  # an empty directory of somebody else
    there = hierarchical.paths(directories)
    assert len(there) == 9
    prune(f"{directories}/run", dry_run=False, credential=KEY)  # it may belong to a save that is running
    prune(f"{directories}/run", grace=datetime.timedelta(0), credential=KEY)
    assert hierarchical.paths(directories) == there
    prune(f"{directories}/run", grace=datetime.timedelta(0), dry_run=False, credential=KEY)
    kept = ["run/", "run/notes/", "run/step-1/", "run/step-1/*/", "run/step-1/*/__0_0.distcp", "run/step-1/.metadata"]
    assert sorted(names(hierarchical, directories)) == sorted(kept)


def test_a_directory_that_somebody_else_uses_stays(directories: str, hierarchical: HierarchicalAccount) -> None:
    url = f"{directories}/run/step-1"
    save(url, 1)
    put(url, "run/step-1/notes.txt", b"kept")
    remove_checkpoint(url, credential=KEY)
    assert names(hierarchical, url) == ["run/", "run/step-1/", "run/step-1/notes.txt"]


# The filesystem


@pytest.fixture
def fs(hierarchical: HierarchicalAccount) -> AzureBlobFileSystem:
    return AzureBlobFileSystem(endpoint=hierarchical.endpoint, account_key=KEY)


@pytest.fixture
def root(directories: str) -> str:
    return f"{Azurite.account_name}/{directories.rpartition('/')[2]}"


def test_the_filesystem_looks(fs: AzureBlobFileSystem, root: str, hierarchical: HierarchicalAccount) -> None:
    fs.makedirs(f"{root}/d/e", exist_ok=True)
    fs.pipe({f"{root}/d/a": b"a", f"{root}/d/e/b": b"bb", f"{root}/gone/x": b"x", f"{root}/zero": b""})
    fs.rm(f"{root}/gone/x")  # its directory stays, as on a disk
    assert [(entry["name"], entry["type"]) for entry in fs.ls(root)] == [
        (f"{root}/d", "directory"),
        (f"{root}/gone", "directory"),
        (f"{root}/zero", "file"),
    ]
    assert fs.isdir(f"{root}/gone") and not fs.isfile(f"{root}/gone") and fs.ls(f"{root}/gone") == []
    assert fs.isfile(f"{root}/zero") and fs.ls(f"{root}/zero") == [fs.info(f"{root}/zero")]
    assert fs.find(root) == [f"{root}/d/a", f"{root}/d/e/b", f"{root}/zero"]
    assert fs.find(f"{root}/d/a") == fs.ls(f"{root}/d/a", detail=False) == [f"{root}/d/a"]
    assert fs.find(f"{root}/gone") == [] and fs.du(root) == 3
    assert fs.glob(f"{root}/**/b") == [f"{root}/d/e/b"]
    walked = {folder: (sorted(folders), sorted(files)) for folder, folders, files in fs.walk(root)}
    assert walked == {
        root: (["d", "gone"], ["zero"]),
        f"{root}/d": (["e"], ["a"]),
        f"{root}/d/e": ([], ["b"]),
        f"{root}/gone": ([], []),
    }
    for read in (fs.cat_file, fs.cat, fs.open, lambda path: fs.open(path, "r")):
        with pytest.raises(FileNotFoundError, match="is a folder"):
            read(f"{root}/d")
    with pytest.raises(FileNotFoundError):
        fs.ls(f"{root}/d/a/below")


def test_the_filesystem_copies_moves_and_removes(
    fs: AzureBlobFileSystem, root: str, directories: str, hierarchical: HierarchicalAccount, tmp_path: Path
) -> None:
    fs.pipe({f"{root}/d/a": b"a", f"{root}/d/e/b": b"bb", f"{root}/d/f/g/c": b""})
    fs.rm(f"{root}/d/f/g/c")
    fs.cp(f"{root}/d", f"{root}/copy", recursive=True)
    assert fs.find(f"{root}/copy") == [f"{root}/copy/a", f"{root}/copy/e/b"]
    fs.mv(f"{root}/d", f"{root}/moved", recursive=True)
    assert not fs.exists(f"{root}/d") and fs.find(f"{root}/moved") == [f"{root}/moved/a", f"{root}/moved/e/b"]
    fs.get(f"{root}/moved", str(tmp_path / "got"), recursive=True)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "got/a",
        "got/e/b",
    ]
    fs.put(str(tmp_path / "got"), f"{root}/put", recursive=True)
    assert fs.cat(f"{root}/put", recursive=True) == {f"{root}/put/a": b"a", f"{root}/put/e/b": b"bb"}
    with pytest.raises(FileNotFoundError):
        fs.rm(f"{root}/put")
    assert fs.exists(f"{root}/put/a")
    for folder in ("copy", "moved", "put"):
        fs.rm(f"{root}/{folder}", recursive=True)
    assert hierarchical.paths(directories) == []


def test_a_blob_and_a_directory_exclude_each_other(fs: AzureBlobFileSystem, root: str) -> None:
    fs.pipe_file(f"{root}/d/a", b"a")
    for path in (f"{root}/d", f"{root}/d/a/below"):
        with pytest.raises(RequestRefusedError):
            fs.pipe_file(path, b"")
    fs.rm(f"{root}/d/a", recursive=True)  # a blob, of which no directory's listing can be made
    assert not fs.exists(f"{root}/d/a") and fs.isdir(f"{root}/d")


# Everything else that keeps something in a container


def test_a_model_in_the_hugging_face_layout(directories: str, hierarchical: HierarchicalAccount) -> None:
    url = f"{directories}/models/m"
    for value in (1.0, 2.0):
        dcp.save(
            {"weight": torch.full((30, 4), value)},
            storage_writer=AzureBlobHuggingFaceWriter(
                url, credential=KEY, fqn_to_index_mapping={"weight": 1}, overwrite=True
            ),
            no_dist=True,
        )
    into = {"weight": torch.zeros(30, 4)}
    dcp.load(into, storage_reader=AzureBlobHuggingFaceReader(url, credential=KEY), no_dist=True)
    assert bool((into["weight"] == 2).all())
    there = hierarchical.paths(directories)
    assert len([path for path in there if path.endswith(".safetensors")]) == 1
    assert [path for path in there if path.endswith("/")] == ["models/", "models/m/"]


def test_the_catalog(directories: str, hierarchical: HierarchicalAccount, tmp_path: Path) -> None:
    for step in (1, 2):
        save(f"{directories}/run/step-{step}", step)
    listed = list_checkpoints(directories, credential=KEY)
    assert [(entry.name, entry.blobs, entry.complete) for entry in listed] == [
        ("run/step-1", 2, True),
        ("run/step-2", 2, True),
    ]
    assert latest(directories, credential=KEY).name == "run/step-2"
    report = copy(f"{directories}/run", f"{directories}/again", credential=KEY)
    assert (report.blobs, report.skipped) == (4, 0)
    assert copy(f"{directories}/run", f"{directories}/again", credential=KEY).skipped == 4
    assert load(f"{directories}/again/step-2") == 2
    assert copy(f"{directories}/run/step-1", tmp_path / "disk", credential=KEY).blobs == 2
    save(f"{directories}/run/step-1", 3)
    copy(f"{directories}/run/step-1", f"{directories}/again/step-1", overwrite=True, credential=KEY)
    assert load(f"{directories}/again/step-1") == 3
    remove_checkpoint(f"{directories}/again/step-1", credential=KEY)
    remove_checkpoint(f"{directories}/again/step-2", credential=KEY)
    assert [path for path in hierarchical.paths(directories) if path.startswith("again")] == ["again/"]
    with pytest.raises(CheckpointNotFoundError, match="Nothing lies there"):
        verify(f"{directories}/again/step-1", credential=KEY)
    with pytest.raises(CheckpointNotFoundError):
        latest(f"{directories}/again", credential=KEY)


def test_the_url_of_a_blob_is_that_of_no_checkpoint(directories: str) -> None:
    put(directories, "run/file.ckpt", b"of another tool")
    with pytest.raises(CheckpointNotFoundError):
        verify(f"{directories}/run/file.ckpt", credential=KEY)
    with pytest.raises(CheckpointNotFoundError):
        remove_checkpoint(f"{directories}/run/file.ckpt", credential=KEY)
    with pytest.raises(RequestRefusedError):
        put(directories, "run/file.ckpt/.metadata", b"")


def test_ranks_with_metadata_of_their_own(directories: str, hierarchical: HierarchicalAccount) -> None:
    url = f"{directories}/run/step-1"
    dcp.save(state(4), storage_writer=AzureBlobWriter(url, credential=KEY), no_dist=True, use_collectives=False)
    assert "run/step-1/__0.metadata" in hierarchical.paths(directories)
    remove_checkpoint(url, credential=KEY)
    assert hierarchical.paths(directories) == ["run/"]


def test_blobio(directories: str) -> None:
    url = f"{directories}/a/b/weights.pt"
    for mode in ("xb", "wb"):
        with BlobIO(url, mode, credential=KEY) as file:
            torch.save({"mode": mode}, file)
    with pytest.raises(FileExistsError):
        BlobIO(url, "xb", credential=KEY)
    with BlobIO(url, "rb", credential=KEY) as file:
        assert torch.load(file) == {"mode": "wb"}


def test_datasets(directories: str, fs: AzureBlobFileSystem, root: str) -> None:
    fs.pipe({f"{root}/train/a/1": b"one", f"{root}/train/b/2": b"two", f"{root}/train/gone/3": b""})
    fs.rm(f"{root}/train/gone/3")
    iterable: Iterable[Any] = IterableBlobDataset.from_container_url(directories, prefix="train/", credential=KEY)
    assert sorted(sample["data"] for sample in iterable) == [b"one", b"two"]
    mapped: Any = BlobDataset.from_container_url(f"{directories}/train", credential=KEY)
    assert sorted(mapped[number]["data"] for number in range(len(mapped))) == [b"one", b"two"]


def test_lightning(directories: str, hierarchical: HierarchicalAccount, tmp_path: Path) -> None:
    """Top-k, last, resume: what is removed leaves no directory."""
    pytest.importorskip("lightning")
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    from azure_torch_ckpt.lightning import AzureBlobCheckpointIO, AzureBlobModelCheckpoint

    folder = f"{directories}/ckpts"
    put(directories, "ckpts/old/x", b"")
    store_of(directories).delete("ckpts/old/x")

    def fit(epochs: int, path: str | None) -> Trainer:
        trainer = Trainer(
            max_epochs=epochs,
            limit_train_batches=2,
            limit_val_batches=0,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            plugins=[AzureBlobCheckpointIO(credential=KEY)],
            callbacks=[AzureBlobModelCheckpoint(dirpath=folder, save_top_k=1, save_last=True)],
        )
        with warnings.catch_warnings():
            # At first there is an empty directory in the folder, which does not count.
            warnings.filterwarnings("error" if path is None else "ignore", ".*is not empty.*")
            trainer.fit(BoringModel(), ckpt_path=path)
        return trainer

    def checkpoints() -> list[str]:
        there = hierarchical.paths(directories)
        directories_ = [path for path in there if path.startswith("ckpts/") and path.count("/") == 2]
        assert all(f"{path}.metadata" in there for path in directories_ if path.endswith("/") and path != "ckpts/old/")
        return [path.removeprefix("ckpts/") for path in directories_ if path.endswith("/")]

    fit(2, None)
    assert sorted(checkpoints()) == ["epoch=1-step=4.ckpt/", "last.ckpt/", "old/"]
    fit(3, f"{folder}/last.ckpt")
    assert sorted(checkpoints()) == ["epoch=2-step=6.ckpt/", "last.ckpt/", "old/"]

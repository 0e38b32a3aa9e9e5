"""The least rights of each operation: a SAS with them is enough, and each of them is needed.

The table in docs/reliability.md is the one here.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from dataclasses import dataclass
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
    BlobIO,
    IterableBlobDataset,
    prune,
    remove_checkpoint,
    verify,
)
from azure_torch_ckpt.catalog import consolidate, copy, inspect, latest, list_checkpoints
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.errors import AccessDeniedError
from azure_torch_ckpt.filesystem import AzureBlobFileSystem
from tests.blobs.stores import KEY
from tests.support.containers import container_sas, put
from tests.support.hierarchical import HierarchicalAccount

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


@dataclass(frozen=True)
class Place:
    """What an operation is given: a container with the checkpoint ``run/step-1``, the model ``model``, and blobs."""

    url: str
    sas: str
    fs: Any  # `AzureBlobFileSystem`; some of its methods return None, which mypy refuses in a tuple
    root: str
    folder: Path


def state() -> dict[str, torch.Tensor]:
    return {"weight": torch.ones(8, 4)}


def save(place: Place, where: str) -> None:
    dcp.save(state(), storage_writer=AzureBlobWriter(f"{place.url}/{where}", credential=place.sas), no_dist=True)


def load(place: Place, where: str) -> None:
    dcp.load(state(), storage_reader=AzureBlobReader(f"{place.url}/{where}", credential=place.sas), no_dist=True)


def save_model(place: Place, where: str) -> None:
    writer = AzureBlobHuggingFaceWriter(f"{place.url}/{where}", credential=place.sas)
    dcp.save(state(), storage_writer=writer, no_dist=True)


def load_model(place: Place, where: str) -> None:
    reader = AzureBlobHuggingFaceReader(f"{place.url}/{where}", credential=place.sas)
    dcp.load(state(), storage_reader=reader, no_dist=True)


def write(place: Place, where: str, mode: Any) -> None:
    with BlobIO(f"{place.url}/{where}", mode, credential=place.sas) as file:
        file.write(b"data")


def local(place: Place) -> str:
    (place.folder / "file").write_bytes(b"data")
    return str(place.folder / "file")


def local_folder(place: Place) -> str:
    (place.folder / "put").mkdir()
    (place.folder / "put/file").write_bytes(b"data")
    return str(place.folder / "put")


def expunge(place: Place) -> None:
    url = f"{place.url}/run"
    report = prune(url, keep_last=1, grace=datetime.timedelta(0), dry_run=False, credential=place.sas)
    for one in report.undeleted:
        raise one.error


# r read, w write, d delete, l list
OPERATIONS: dict[str, tuple[str, Callable[[Place], Any]]] = {
    "save at a new URL": ("rw", lambda place: save(place, "new")),
    "save that replaces": ("rw", lambda place: save(place, "run/step-1")),
    "load": ("r", lambda place: load(place, "run/step-1")),
    "`verify`": ("r", lambda place: verify(f"{place.url}/run/step-1", credential=place.sas)),
    "`inspect`": ("r", lambda place: inspect(f"{place.url}/run/step-1", credential=place.sas)),
    "`remove_checkpoint`": ("rd", lambda place: remove_checkpoint(f"{place.url}/run/step-1", credential=place.sas)),
    "`list_checkpoints`, `latest`": (
        "l",
        lambda place: (list_checkpoints(place.url, credential=place.sas), latest(place.url, credential=place.sas)),
    ),
    "`prune`, dry run": (
        "rl",
        lambda place: prune(f"{place.url}/run", grace=datetime.timedelta(0), credential=place.sas),
    ),
    "`prune`": ("rdl", expunge),
    "`copy` from, to a disk": ("rl", lambda place: copy(f"{place.url}/run", place.folder, credential=place.sas)),
    "`copy` from and to": (
        "rwl",
        lambda place: copy(f"{place.url}/run", f"{place.url}/again", credential=place.sas),
    ),
    "`consolidate`, to a disk": (
        "r",
        lambda place: consolidate(f"{place.url}/run/step-1", place.folder / "model.pt", credential=place.sas),
    ),
    "save of a Hugging Face model at a new URL": ("rw", lambda place: save_model(place, "new-model")),
    "load of a Hugging Face model": ("r", lambda place: load_model(place, "model")),
    '`BlobIO` `"rb"`': ("r", lambda place: BlobIO(f"{place.url}/blob", "rb", credential=place.sas).read()),
    '`BlobIO` `"wb"`': ("w", lambda place: write(place, "blob", "wb")),
    '`BlobIO` `"xb"`': ("w", lambda place: write(place, "new", "xb")),
    "dataset from a container": (
        "rl",
        lambda place: list(IterableBlobDataset.from_container_url(place.url, prefix="f", credential=place.sas)),
    ),
    "dataset from URLs": (
        "r",
        lambda place: list(IterableBlobDataset.from_blob_urls([f"{place.url}/blob"], credential=place.sas)),
    ),
    "`info`, `exists`, `ls`, `find` of a blob": (
        "r",
        lambda place: (
            place.fs.info(f"{place.root}/blob"),
            place.fs.exists(f"{place.root}/blob"),
            place.fs.ls(f"{place.root}/blob"),
            place.fs.find(f"{place.root}/blob"),
            place.fs.info(f"{place.root}/empty"),
            place.fs.ls(f"{place.root}/empty"),
        ),
    ),
    "`ls`, `find`, `glob`, `walk`, `du` of a folder": (
        "l",
        lambda place: (
            place.fs.ls(f"{place.root}/folder"),
            place.fs.find(f"{place.root}/folder"),
            place.fs.glob(f"{place.root}/folder/*"),
            list(place.fs.walk(f"{place.root}/folder")),
            place.fs.du(f"{place.root}/folder"),
        ),
    ),
    "`cat`, `get` of a blob, `open` for reading": (
        "r",
        lambda place: (
            place.fs.cat(f"{place.root}/blob"),
            place.fs.get(f"{place.root}/blob", str(place.folder / "got")),
            place.fs.open(f"{place.root}/blob").read(),
        ),
    ),
    "`cat`, `get` of a folder": (
        "rl",
        lambda place: (
            place.fs.cat(f"{place.root}/folder", recursive=True),
            place.fs.get(f"{place.root}/folder", str(place.folder / "got"), recursive=True),
        ),
    ),
    "`put`, `pipe`, `open` for writing": (
        "w",
        lambda place: (
            place.fs.put(local(place), f"{place.root}/new"),
            place.fs.put(local_folder(place), f"{place.root}/new-folder", recursive=True),
            place.fs.pipe(f"{place.root}/new-2", b"data"),
            place.fs.open(f"{place.root}/new-3", "wb").close(),
        ),
    ),
    "`cp` of a blob": ("rw", lambda place: place.fs.cp(f"{place.root}/blob", f"{place.root}/new")),
    "`mv` of a blob": ("rwd", lambda place: place.fs.mv(f"{place.root}/blob", f"{place.root}/new")),
    "`rm` of a blob": ("d", lambda place: place.fs.rm(f"{place.root}/blob")),
    "`rm` of a folder": ("dl", lambda place: place.fs.rm(f"{place.root}/folder", recursive=True)),
}


@pytest.fixture
def filled(container: str) -> str:
    whole = Place(container, container_sas(container), None, "", Path())
    for step in (1, 2):
        save(whole, f"run/step-{step}")
    save_model(whole, "model")
    for name in ("blob", "empty", "folder/a", "folder/b/c", f"run/step-1/{'0' * 32}/__0_0.distcp"):
        put(container, name, b"" if name == "empty" else b"data")
    return container


def place(azurite: Azurite, container: str, rights: str, folder: Path) -> Place:
    sas = container_sas(container, rights)
    fs = AzureBlobFileSystem(endpoint=azurite.endpoint, sas_token=sas)
    folder.mkdir()
    return Place(container, sas, fs, f"{azurite.account_name}/{container.rpartition('/')[2]}", folder)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_least_rights_are_enough_and_needed(azurite: Azurite, filled: str, tmp_path: Path, name: str) -> None:
    rights, act = OPERATIONS[name]
    # At first with less: what is refused has changed nothing that the next attempt needs.
    for missing in rights:
        less = rights.replace(missing, "") or ("d" if missing != "d" else "r")
        with pytest.raises(BaseException) as caught:
            act(place(azurite, filled, less, tmp_path / f"without-{missing}"))
        assert denied(caught.value), (missing, caught.value)
    act(place(azurite, filled, rights, tmp_path / "enough"))


def denied(error: BaseException) -> bool:
    """Also in torch's collection of the errors of ranks."""
    failures = getattr(error, "failures", {})
    return isinstance(error, AccessDeniedError) or any(denied(one) for one, _ in failures.values())


def test_the_documented_table_is_this_one() -> None:
    section = DOCUMENT.read_text(encoding="utf-8").partition("## Rights")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| (.+?) \| ([rwdl, ]+) \|", section, flags=re.MULTILINE))
    assert rows == {name: ", ".join(rights) for name, (rights, _) in OPERATIONS.items()}


def test_prune_lists_nothing_above_its_url(directories: str, hierarchical: HierarchicalAccount) -> None:
    """A SAS for a directory is good for nothing above it. Azurite knows none; the double of such an account does."""
    run = f"{directories}/run"
    for step in (1, 2):
        dcp.save(state(), storage_writer=AzureBlobWriter(f"{run}/step-{step}", credential=KEY), no_dist=True)
    sas = hierarchical.directory_sas(run, "rdl")
    hierarchical.log.clear()
    report = prune(run, keep_last=1, dry_run=False, credential=sas)
    assert [entry.name for entry in report.removed] == ["step-1"]
    prefixes = {seen.query["prefix"] for seen in hierarchical.log if seen.query.get("comp") == "list"}
    assert prefixes == {"run/"}
    assert [path for path in hierarchical.paths(directories) if "step-1" in path] == []


def test_everything_else_stays_below_its_url_too(directories: str, hierarchical: HierarchicalAccount) -> None:
    run = f"{directories}/run"
    sas = hierarchical.directory_sas(run, "rcwdl")
    fs = AzureBlobFileSystem(endpoint=hierarchical.endpoint, sas_token=sas)
    root = f"{Azurite.account_name}/{directories.rpartition('/')[2]}/run"
    for _ in range(2):
        dcp.save(state(), storage_writer=AzureBlobWriter(f"{run}/step-1", credential=sas), no_dist=True)
    dcp.load(state(), storage_reader=AzureBlobReader(f"{run}/step-1", credential=sas), no_dist=True)
    assert verify(f"{run}/step-1", credential=sas).ok
    assert latest(run, credential=sas).name == "step-1"
    copy(f"{run}/step-1", f"{run}/copy", credential=sas)
    fs.pipe_file(f"{root}/files/a", b"data")
    assert len(fs.find(root)) == 5 and fs.ls(f"{root}/files/a")
    fs.mv(f"{root}/files", f"{root}/moved", recursive=True)
    fs.rm(f"{root}/moved", recursive=True)
    remove_checkpoint(f"{run}/step-1", credential=sas)
    remove_checkpoint(f"{run}/copy", credential=sas)
    assert hierarchical.paths(directories) == ["run/"]
    assert not [seen for seen in hierarchical.log if seen.status == 403 and directories.endswith(seen.container)]


def test_where_no_listing_is_allowed_the_error_says_what_is_not_known(azurite: Azurite, filled: str) -> None:
    with pytest.raises(FileNotFoundError, match="listing"):
        verify(f"{filled}/run/step-9", credential=container_sas(filled, "r"))
    with pytest.raises(AccessDeniedError):  # it may have metadata of single ranks
        remove_checkpoint(f"{filled}/run/step-9", credential=container_sas(filled, "rd"))

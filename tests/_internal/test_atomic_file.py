"""`AtomicFile`: what is seen at the path, and at what time. On the disk of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from azure_torch_ckpt import BlobIO
from azure_torch_ckpt._internal.atomic_file import AtomicFile, is_part, remove_abandoned
from azure_torch_ckpt.catalog.copying.trees import LocalFile
from tests.filesystem.emulated_filesystem import azblob, filesystem


def test_the_file_appears_when_it_is_published(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with AtomicFile(path) as new:
        new.file.write(b"new")
        assert path.read_bytes() == b"old"
        new.publish()
        assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_without_publish_nothing_is_left(tmp_path: Path):
    with pytest.raises(RuntimeError, match="in the middle"), AtomicFile(tmp_path / "file") as new:
        new.file.write(b"new")
        raise RuntimeError("in the middle")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_another_file_is_not_replaced_if_only_a_new_one_is_wanted(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
):
    if not links:  # as on exFAT and some network file systems
        monkeypatch.setattr(os, "link", refuse)
    for _ in range(2):
        with AtomicFile(tmp_path / "new") as new:
            new.publish(only_new=True)
        assert os.listdir(tmp_path) == ["new"]
        with AtomicFile(tmp_path / "new") as new, pytest.raises(FileExistsError):
            new.publish(only_new=True)
        assert os.listdir(tmp_path) == ["new"]
        os.unlink(tmp_path / "new")


def refuse(*_: object) -> None:
    raise PermissionError("no hard links")


@pytest.mark.parametrize("name", ["a", "ü" * 127, "n" * 255, ".hidden"])
def test_a_part_is_known_and_removed_only_if_nobody_writes_it(tmp_path: Path, name: str):
    with AtomicFile(tmp_path / name) as new:
        (part,) = os.listdir(tmp_path)
        assert is_part(part) and not is_part(name)
        remove_abandoned(tmp_path / part)
        assert os.listdir(tmp_path) == [part]
        new.publish()
    (tmp_path / part).write_bytes(b"of a process that was killed")
    remove_abandoned(tmp_path / part)
    assert os.listdir(tmp_path) == [name]


def test_a_blob_with_a_name_as_long_as_a_file_can_have_is_fetched(container: str, tmp_path: Path):
    name = "ü" * 127
    with BlobIO(f"{container}/{name}", "wb") as file:
        file.write(b"1")
    filesystem(container).get(f"{azblob(container)}/{name}", str(tmp_path / name))
    assert (tmp_path / name).read_bytes() == b"1"
    LocalFile(tmp_path / "copy" / name).publish()
    assert os.listdir(tmp_path / "copy") == [name]

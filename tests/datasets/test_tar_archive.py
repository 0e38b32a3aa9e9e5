"""The content of tar files: links, concatenated archives, duplicate fields; and how damage is reported."""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import pickle
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from azure_torch_ckpt import AzureCheckpointError, TarShardError
from azure_torch_ckpt.datasets import BlobCache, TarDataset
from tests.datasets.sample_blobs import fill, key, shard, tar_of

FORMS = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def pack(members: Iterable[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def read(container: str, **settings: Any) -> list[dict[str, Any]]:
    dataset: TarDataset[dict[str, Any]] = TarDataset.from_container_url(container, **settings)
    return [{name: value for name, value in sample.items() if name not in ("__url__", "url")} for sample in dataset]


def link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, kind=tarfile.LNKTYPE, link=target)


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, kind=tarfile.SYMTYPE, link=target)


# Samples that cannot be made


@pytest.mark.parametrize("buffer", [0, 3])
@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("a/1.jpg", r"the sample 'a/1' has a second member with the extension 'jpg'"),
        ("a/1.JPG", r"the sample 'a/1' has a second member with the extension 'jpg'"),
        ("a/1.__key__", r"with the extension '__key__', which the sample's own entry has"),
        ("a/1.__URL__", r"with the extension '__url__', which the sample's own entry has"),
    ],
)
def test_a_sample_with_a_field_twice_is_an_error_or_skipped(
    container: str, second: str, message: str, retries: int, buffer: int, caplog: pytest.LogCaptureFixture
):
    names = ["a/0.jpg", "a/1.jpg", second, "a/1.cls", "a/2.jpg", "a/3.jpg"]
    fill(container, {"train.tar": pack(member(name, name.encode()) for name in names)})
    settings: dict[str, Any] = {"shuffle_buffer": buffer, "retries": retries}
    found: list[str] = []
    dataset: TarDataset[dict[str, Any]] = TarDataset.from_container_url(container, **settings)
    with pytest.raises(TarShardError, match=rf"/train\.tar: .*{message}"):
        found.extend(sample["__key__"] for sample in dataset)
    state = dataset.state_dict()
    with caplog.at_level(logging.WARNING):
        skipping: TarDataset[dict[str, Any]] = TarDataset.from_container_url(container, on_error="skip", **settings)
        skipping.load_state_dict(state)
        found += [sample["__key__"] for sample in skipping]
    assert sorted(found) == ["a/0", "a/2", "a/3"]
    assert skipping.skipped == 1 and "train.tar" in caplog.text
    # Single members may have any name.
    assert [sample["name"] for sample in read(container, group=False)] == names


def test_a_key_that_occurs_again_is_another_sample(container: str):
    names = ["0.jpg", "1.jpg", "0.jpg"]
    fill(container, {"0.tar": pack(member(name) for name in names), "1.tar": pack([member("0.cls")])})
    assert read(container) == [
        {"__key__": "0", "jpg": b""},
        {"__key__": "1", "jpg": b""},
        {"__key__": "0", "jpg": b""},
        {"__key__": "0", "cls": b""},
    ]


def test_a_workers_error_names_the_file(container: str):
    fill(container, {"train.tar": pack([member("1.jpg"), member("1.jpg")])})
    dataset: TarDataset[Any] = TarDataset.from_container_url(container)
    with pytest.raises(TarShardError, match=r"/train\.tar: the sample '1'"):
        list(DataLoader(dataset, num_workers=1, batch_size=None))


# Links


@pytest.mark.parametrize("name", ["links.tar", "links.tar.gz"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_link_yields_what_it_points_to(container: str, name: str, cached: bool, tmp_path: Path):
    packed = pack(
        [
            symlink("0.jpg", "dir/later.bin"),  # forwards
            member("1.jpg", b"old"),
            member("./1.cls", b"one" * 400),
            link("2.jpg", "./1.jpg"),
            symlink("2.cls", "./2.jpg"),  # to a link
            member("1.jpg", b"new"),  # which the first link is not one to
            link("3.jpg", "1.jpg"),
            member("dir", kind=tarfile.DIRTYPE),
            member("dir/later.bin", b"later"),
            symlink("dir/4.jpg", "../2.cls"),
            symlink("v1.0", "dir"),  # no file
            symlink("v1.1", "."),
            member("5.txt", b""),
            link("6.txt", "5.txt"),
        ]
    )
    fill(container, {name: gzip.compress(packed) if name.endswith("gz") else packed})
    settings: dict[str, Any] = {"cache": BlobCache(tmp_path, 10_000_000)} if cached else {}
    expected = {
        "0.jpg": b"later",
        "1.cls": b"one" * 400,
        "1.jpg": b"new",
        "2.cls": b"old",
        "2.jpg": b"old",
        "3.jpg": b"new",
        "5.txt": b"",
        "6.txt": b"",
        "dir/4.jpg": b"old",
        "dir/later.bin": b"later",
    }
    members = read(container, group=False, **settings)
    assert {one["name"].removeprefix("./"): one["data"] for one in members} == expected
    dataset: TarDataset[dict[str, Any]] = TarDataset.from_container_url(container, group=False, **settings)
    source = iter(dataset)
    for done in range(len(members)):
        resumed: TarDataset[dict[str, Any]] = TarDataset.from_container_url(container, group=False, **settings)
        resumed.load_state_dict(dataset.state_dict())
        assert [one["data"] for one in resumed] == [one["data"] for one in members[done:]]
        next(source)


@pytest.mark.parametrize(
    "wrong",
    [
        link("1.jpg", "2.jpg"),  # it follows: a hard link points to an earlier member
        link("1.jpg", "gone.jpg"),
        symlink("1.jpg", "/data/0.jpg"),
        symlink("1.jpg", "1.jpg"),
        symlink("1.jpg", "../../0.jpg"),
    ],
    ids=lambda wrong: f"{wrong[0].type.decode()}-{wrong[0].linkname.replace('/', '_')}",
)
def test_a_link_without_a_target_is_an_error_or_its_sample_is_skipped(container: str, wrong: Any):
    packed = pack([member("0.jpg", b"0"), wrong, member("1.cls", b"1"), member("2.jpg", b"2")])
    fill(container, {"train.tar": packed})
    with pytest.raises(TarShardError, match=r"/train\.tar: '1\.jpg' is a link to '.*', which is not in the tar file"):
        read(container)
    assert [sample["__key__"] for sample in read(container, on_error="skip")] == ["0", "2"]
    assert [sample["name"] for sample in read(container, on_error="skip", group=False)] == ["0.jpg", "1.cls", "2.jpg"]


def test_gnu_tars_linked_long_and_sparse_files(container: str, tmp_path: Path):
    # A name of more than 100 characters has a header of its own.
    long = "d" * 120
    folder = tmp_path / "in" / long
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(b"x" * 700)
    (folder / "2.jpg").hardlink_to(folder / "1.jpg")
    (folder / "3.jpg").symlink_to("1.jpg")
    with (folder / "4.jpg").open("wb") as file:
        file.truncate(1_000_000)
        file.seek(500_000)
        file.write(b"in the middle")
    for form in ("gnu", "pax"):
        command = ["tar", f"--format={form}", "--sparse", "-cf", f"{form}.tar", "-C", "in"]
        # tar packs a file that is named twice again, as a link to itself.
        subprocess.run([*command, f"./{long}", f"./{long}/1.jpg"], check=True, cwd=tmp_path)
        packed = (tmp_path / f"{form}.tar").read_bytes()
        fill(container, {f"{form}/train.tar": packed})
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            expected = [
                (one.name, reader.read())
                for one in tar
                if not one.issparse() and (reader := tar.extractfile(one)) is not None
            ]
        assert [data for _, data in expected] == [b"x" * 700] * 4
        found = read(f"{container}/{form}", group=False, on_error="skip")
        assert [(one["name"], one["data"]) for one in found] == expected
        with pytest.raises(TarShardError, match=r"train\.tar: .*sparse"):
            read(f"{container}/{form}", group=False)


# Archives


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compressed", [False, True])
def test_concatenated_archives_are_read(container: str, form: int, compressed: bool):
    parts = [tar_of(shard(3 * number, 3, 1), form=form) for number in range(3)]
    parts.insert(1, tar_of({}))
    if compressed:
        parts = [gzip.compress(part) for part in parts]
    fill(container, {"train.tar.gz" if compressed else "train.tar": b"".join(parts)})
    dataset = TarDataset.from_container_url(container, transform=key)
    assert list(dataset) == list(range(9))
    source = iter(dataset)
    for done in range(1, 10):
        next(source)
        resumed = TarDataset.from_container_url(container, transform=key)
        resumed.load_state_dict(pickle.loads(pickle.dumps(dataset.state_dict())))
        assert list(resumed) == list(range(done, 9))


def test_other_data_behind_an_archive_is_an_error(container: str):
    whole = tar_of(shard(0, 3, 1))
    fill(container, {"0.tar": whole + b"signature"})
    with pytest.raises(TarShardError, match=r"/0\.tar: .*damaged"):
        list(TarDataset.from_container_url(container))


def test_a_file_that_is_cut_anywhere_is_an_error(container: str):
    whole = tar_of(shard(0, 3, 400))
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    cuts = [*range(0, end + 1, 512), *range(100, end, 512), end - 1]
    fill(container, {f"{cut}/0.tar": whole[:cut] for cut in cuts})
    for cut in cuts:
        with pytest.raises(TarShardError, match=r"/0\.tar: it is "):
            list(TarDataset.from_container_url(f"{container}/{cut}", transform=key))
        complete = list(TarDataset.from_container_url(f"{container}/{cut}", transform=key, on_error="skip"))
        assert complete == [0, 1, 2][: len(complete)] and len(complete) < 3
    # One block of zeros, or a part of it, is enough as an end.
    fill(container, {"1/0.tar": whole[: end + 512], "2/0.tar": whole[: end + 100]})
    for folder in (1, 2):
        assert list(TarDataset.from_container_url(f"{container}/{folder}", transform=key)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("0.tar", b"", "it is empty"),
        ("0.tar.gz", b"", "it is empty"),
        ("0.tar", tar_of(shard(0, 1), "w:gz"), r"compressed with gzip\. Let its name end in \.tar\.gz"),
        ("0.tar", bz2.compress(tar_of(shard(0, 1))), r"compressed with bzip2\. Compress it once, with gzip"),
        ("0.tar", lzma.compress(tar_of(shard(0, 1))), r"compressed with xz\. Compress it once, with gzip"),
        ("0.tgz", tar_of(shard(0, 1)), r"Let its name end in \.tar if it is not compressed"),
        ("0.tgz", gzip.compress(tar_of(shard(0, 1), "w:gz")), r"compressed with gzip\. Compress it once"),
        ("0.tgz", tar_of(shard(0, 1), "w:gz")[:15], "damaged or incomplete"),
        ("0.tar", b"no tar file" * 100, "damaged or incomplete"),
        ("0.tar", b"short", "damaged or incomplete"),
    ],
    ids=["empty", "empty-gz", "gzip", "bzip2", "xz", "no-gzip", "twice", "cut-gz", "text", "short"],
)
def test_an_error_names_the_file_and_what_to_do(container: str, name: str, data: bytes, message: str):
    fill(container, {name: data, "1.tar": tar_of(shard(7, 2))})
    with pytest.raises(TarShardError, match=rf"^http\S*/{name}: .*{message}") as caught:
        list(TarDataset.from_container_url(container))
    assert isinstance(caught.value, AzureCheckpointError) and "?" not in str(caught.value)
    assert list(TarDataset.from_container_url(container, transform=key, on_error="skip")) == [7, 8]


def test_hostile_sizes_end_in_an_error(container: str):
    def sized(size: int) -> bytes:
        info, _ = member("1.jpg")
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240)

    negative, huge = sized(-512), sized(2**60)
    fill(container, {"0/0.tar": negative, "1/0.tar": huge, "2/0.tar": negative[:-1024] + negative})
    for folder in range(3):
        with pytest.raises(TarShardError, match=r"/0\.tar: it is damaged"):
            list(TarDataset.from_container_url(f"{container}/{folder}"))


def test_names_of_any_kind(container: str):
    names = ["dir/", "./a.b/1.x.y", "a/.hidden", "no-extension", "__meta.json__", "a/__meta.json__", "b.", "ä/ü.jpg"]
    odd = b"\xff\xfe/1.jpg".decode("utf-8", "surrogateescape")
    names.append(odd)
    members = [member(names[0], kind=tarfile.DIRTYPE), *(member(name, b"1") for name in names[1:])]
    fill(container, {f"{form}.tar": pack(members, form) for form in FORMS})
    expected = [
        {"__key__": "./a.b/1", "x.y": b"1"},
        {"__key__": "a/__meta", "json__": b"1"},
        {"__key__": "b", "": b"1"},
        {"__key__": "ä/ü", "jpg": b"1"},
        {"__key__": odd.removesuffix(".jpg"), "jpg": b"1"},
    ]
    assert read(container) == expected * 2

"""`BlobListing`: the blobs of a dataset as one compact list, listed once, saved, loaded and shared by processes."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import mmap
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from azure_torch_ckpt._internal.atomic_file import AtomicFile
from azure_torch_ckpt._internal.checksums import crc64
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access, Credential
from azure_torch_ckpt.errors import LocationError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions

__all__ = ["BlobListing", "ListedBlob"]

_MAGIC = b"azure-torch-ckpt blob listing 1\n"
# The form of the service's ETags. Others are stored as text.
_ETAG = re.compile(r'"0x([1-9A-F][0-9A-F]{0,15})"', re.ASCII)
_ALIGNMENT = 8
# A last segment of a URL that is the same in the blob's name and that `BlobLocation` accepts.
_PLAIN = re.compile(r"[A-Za-z0-9_-]([A-Za-z0-9_.-]{0,100}[A-Za-z0-9_-])?", re.ASCII)
# Names that `BlobLocation` may refuse. To ask it costs 10 microseconds a name.
_SUSPECT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\\?&]|(?:^|/)\.{0,2}(?:/|$)")
_FOLDERS = 10_000
_FOLDER_LENGTH, _FOLDER_DEPTH = 500, 100


@dataclass(frozen=True, slots=True)
class ListedBlob:
    """One entry. `size` (bytes) and `etag` are those at the time of listing, None if only the URL is known."""

    location: BlobLocation
    size: int | None
    etag: str | None

    @property
    def url(self) -> str:
        """The URL without its query: no SAS, snapshot or version."""
        return str(dataclasses.replace(self.location, sas=None, snapshot=None, version_id=None))


class BlobListing:
    """Names, sizes and ETags of any number of blobs, in 24 bytes each and the name.

        listing = BlobListing.from_container_url(url, prefix="train/", suffix=".jpg")
        listing.save("train.listing")                        # once, on one machine
        dataset = BlobDataset(BlobListing.load("train.listing"))

    A loaded listing is mapped into memory, so all processes of a machine share it. It never changes. A file contains no
    SAS. A pickle contains it, because a worker could not read otherwise.
    """

    def __init__(self, containers: tuple[BlobLocation, ...], columns: _Columns) -> None:
        self._containers = containers
        self._columns = columns
        self._fingerprint: int | None = None

    @classmethod
    def from_container_url(
        cls,
        container_url: str | os.PathLike[str] | BlobLocation,
        *,
        prefix: str | None = None,
        glob: str | None = None,
        suffix: str | tuple[str, ...] | None = None,
        credential: Credential = None,
        options: TransferOptions | None = None,
        ca_file: str | None = None,
    ) -> BlobListing:
        """List a container in the order of the blobs' names, with one request for 5,000 blobs.

        Blobs that represent folders are left out: the directories of accounts with a hierarchical namespace, and empty
        blobs that mark folders elsewhere.

        Args:
            container_url: a path in it is a folder, and only blobs below it are listed.
            prefix: prefix of the names below that folder.
            glob: pattern for the whole name, as in `fnmatch.fnmatchcase`: ``*`` matches ``/``, too.
            suffix: suffix of the name, or several of which one must match.

        Raises:
            StoreError: the container cannot be listed.
            LocationError: the container has a blob that cannot be read by its name.
        """
        location = BlobLocation.parse(container_url)
        store = BlobStore(location, Access(credential, options, ca_file))
        folder = location.prefix
        wanted = _filter(glob, suffix)
        columns = _Builder(location.container_root())
        for info in store.list(folder + (prefix or "")):
            if not info.is_folder and wanted(info.path):
                columns.add(info.path, info.size, info.etag)
        return cls((location.container_root(),), columns.done({}))

    @classmethod
    def from_blob_urls(cls, blob_urls: str | Iterable[str | os.PathLike[str] | BlobLocation]) -> BlobListing:
        """Make a listing of the blobs at these URLs, in this order and in any containers, without a request.

        Raises:
            LocationError: a URL is not that of a blob.
        """
        urls = [blob_urls] if isinstance(blob_urls, (str, os.PathLike, BlobLocation)) else blob_urls
        numbers: dict[BlobLocation, int] = {}
        moments: dict[int, tuple[str | None, str | None]] = {}
        columns = _Builder()
        folders: dict[str, tuple[str, int] | None] = {}
        for index, url in enumerate(urls):
            # Parsing a URL costs 40 microseconds, and most URLs have the same folder as another one.
            folder, _, name = url.rpartition("/") if isinstance(url, str) else ("", "", "")
            if _PLAIN.fullmatch(name):
                if folder not in folders and len(folders) < _FOLDERS:
                    folders[folder] = _folder(folder, numbers)
                known = folders.get(folder)
                if known is not None:
                    columns.add(known[0] + name, None, None, known[1])
                    continue
            location = BlobLocation.parse_blob(url)
            if not location.path:
                raise LocationError(f"{location} is a container. Append the name of a blob")
            if location.snapshot is not None or location.version_id is not None:
                moments[index] = (location.snapshot, location.version_id)
            root = location.container_root()
            columns.add(location.path, None, None, numbers.setdefault(root, len(numbers)))
        return cls(tuple(numbers), columns.done(moments))

    def __len__(self) -> int:
        return len(self._columns.ends)

    def __getitem__(self, index: int) -> ListedBlob:
        if not -len(self) <= index < len(self):
            raise IndexError(f"blob {index} of {len(self)}")
        index %= len(self)
        columns = self._columns
        container = self._containers[columns.containers[index] if columns.containers else 0]
        snapshot, version_id = columns.moments.get(index, (None, None))
        location = dataclasses.replace(container, path=self.name(index), snapshot=snapshot, version_id=version_id)
        size = columns.sizes[index]
        return ListedBlob(location, None if size < 0 else size, columns.etag(index))

    def __iter__(self) -> Iterator[ListedBlob]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        containers = ", ".join(str(container) for container in self._containers[:3])
        return f"<BlobListing of {len(self)} blobs in {containers}{', ...' if len(self._containers) > 3 else ''}>"

    def name(self, index: int) -> str:
        """Return the name of a blob in its container."""
        start = self._columns.ends[index - 1] if index else 0
        return bytes(self._columns.names[start : self._columns.ends[index]]).decode()

    @property
    def fingerprint(self) -> int:
        """A checksum of the names and their order, equal for two listings of the same blobs."""
        if self._fingerprint is None:
            columns = self._columns
            ends = memoryview(columns.ends).cast("B") if len(columns.ends) else memoryview(b"")
            self._fingerprint = crc64(ends, crc64(memoryview(columns.names)))
        return self._fingerprint

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file, which appears when it is complete. It contains no SAS: pass a credential when you load it."""
        columns = self._columns
        sections = columns.sections()
        header = {
            "fingerprint": self.fingerprint,
            "containers": [str(container) for container in self._containers],
            "moments": {str(index): moment for index, moment in columns.moments.items()},
            "etags": {str(index): etag for index, etag in columns.other_etags.items()},
            "sections": [section.nbytes for section in sections],
        }
        with AtomicFile(path) as new:
            head = json.dumps(header).encode()
            new.file.write(_MAGIC + len(head).to_bytes(8, "little") + head)
            for section in sections:
                new.file.write(bytes(-new.file.tell() % _ALIGNMENT))
                new.file.write(section)
            new.publish()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BlobListing:
        """Map a saved listing into memory.

        Raises:
            ValueError: the file is not a listing, or incomplete.
        """
        with open(path, "rb") as file:
            data = memoryview(
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
            )
        start = len(_MAGIC) + 8
        if bytes(data[: len(_MAGIC)]) != _MAGIC:
            raise ValueError(f"{os.fspath(path)} is not a listing of this version. Write it with BlobListing.save")
        end = start + int.from_bytes(data[len(_MAGIC) : start], "little")
        sections = []
        try:
            header = json.loads(bytes(data[start:end]))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is incomplete or damaged. Copy it again") from error
        for length in header["sections"]:
            start = end + -end % _ALIGNMENT
            end = start + length
            sections.append(data[start:end])
        if end != len(data):
            raise ValueError(
                f"{os.fspath(path)} has {len(data)} bytes instead of {end}, so it is incomplete. Copy it again"
            )
        names, ends, sizes, etags, numbers = sections
        columns = _Columns(
            names,
            ends.cast("Q"),
            sizes.cast("q"),
            etags.cast("Q"),
            numbers.cast("I"),
            {int(index): etag for index, etag in header["etags"].items()},
            {int(index): (moment[0], moment[1]) for index, moment in header["moments"].items()},
        )
        listing = cls(tuple(BlobLocation.parse(url) for url in header["containers"]), columns)
        listing._fingerprint = header["fingerprint"]
        columns.path = os.path.abspath(path)
        return listing

    def __reduce__(self) -> tuple[Any, ...]:
        if self._columns.path is not None:
            return _load_again, (self._columns.path, self._containers, self.fingerprint)
        return BlobListing, (self._containers, self._columns)


def _load_again(path: str, containers: tuple[BlobLocation, ...], fingerprint: int) -> BlobListing:
    listing = BlobListing.load(path)
    if listing.fingerprint != fingerprint:
        raise ValueError(f"{path} was replaced by another listing since this process loaded it. Restart the process")
    listing._containers = containers
    return listing


@dataclass(slots=True)
class _Columns:
    """Entry i has the name ``names[ends[i - 1]:ends[i]]``. A size of -1 is unknown; an ETag of 0 is in `other_etags`.

    Attributes:
        containers: the index of each entry's container; empty if there is only one container.
        path: the file that the columns are mapped from.
    """

    names: Any
    ends: Any
    sizes: Any
    etags: Any
    containers: Any
    other_etags: dict[int, str]
    moments: dict[int, tuple[str | None, str | None]]
    path: str | None = None

    def etag(self, index: int) -> str | None:
        packed = self.etags[index]
        return f'"0x{packed:X}"' if packed else self.other_etags.get(index)

    def sections(self) -> list[memoryview]:
        return [memoryview(part) for part in (self.names, self.ends, self.sizes, self.etags, self.containers)]


class _Builder:
    """Collects columns. It checks the names of `container`; without one, they are from URLs, which are valid."""

    def __init__(self, container: BlobLocation | None = None) -> None:
        self._container = container
        self._names = bytearray()
        self._ends, self._sizes, self._etags, self._containers = array("Q"), array("q"), array("Q"), array("I")
        self._other_etags: dict[int, str] = {}

    def add(self, name: str, size: int | None, etag: str | None, container: int = 0) -> None:
        if self._container is not None and _SUSPECT.search(name):
            try:
                dataclasses.replace(self._container, path=name)
            except LocationError as error:
                # Raised now, not in the middle of an epoch. The text after a "?" may be a secret.
                raise LocationError(
                    f"{self._container} has a blob that cannot be read, {name.partition('?')[0]!r}: {error} Rename it, "
                    "or exclude it with prefix=, glob= or suffix="
                ) from error
        self._names += name.encode()
        self._ends.append(len(self._names))
        self._sizes.append(-1 if size is None else size)
        packed = _ETAG.fullmatch(etag) if etag is not None else None
        if packed is None and etag is not None:
            self._other_etags[len(self._etags)] = etag
        self._etags.append(int(packed[1], 16) if packed else 0)
        self._containers.append(container)

    def done(self, moments: dict[int, tuple[str | None, str | None]]) -> _Columns:
        containers = self._containers if any(self._containers) else array("I")
        return _Columns(
            bytes(self._names), self._ends, self._sizes, self._etags, containers, self._other_etags, moments
        )


def _filter(glob: str | None, suffix: str | tuple[str, ...] | None) -> Callable[[str], bool]:
    pattern = None if glob is None else re.compile(fnmatch.translate(glob))
    return lambda name: (
        (pattern is None or pattern.match(name) is not None) and (suffix is None or name.endswith(suffix))
    )


def _folder(url: str, numbers: dict[BlobLocation, int]) -> tuple[str, int] | None:
    """Return the common prefix of the names of the blobs at ``{url}/...``, and the index of their container.

    None for a URL that needs the full parser.
    """
    if len(url) > _FOLDER_LENGTH or url.count("/") > _FOLDER_DEPTH or url.endswith("/") or "?" in url or "#" in url:
        return None
    try:
        location = BlobLocation.parse(url)
    except LocationError:  # the URL of an account, so the plain name is a container
        return None
    root = location.container_root()
    return location.prefix, numbers.setdefault(root, len(numbers))

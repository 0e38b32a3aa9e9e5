"""A double of a storage account with a hierarchical namespace, which Azurite cannot be.

    with HierarchicalAccount(azurite.endpoint) as account:
        url = account.create_container("checkpoints")  # the key is Azurite's

Azurite keeps the blobs; this is a proxy in front of it that makes directories of the paths:

- A directory is an empty blob with the metadata ``hdi_isfolder: true`` and the resource type ``directory``. It appears
  when something is written below it, stays when that goes, and is listed: flat among the blobs, with a delimiter as a
  prefix (facts ``head-hns-directory``, ``head-hns-directory-new`` and ``list-hns`` of recordings of the service; List
  Blobs returns ``ResourceType`` since version 2020-10-02).
- Delete Blob of a directory: 400 OperationNotSupportedOnDirectory with ``x-ms-delete-snapshots``, 409
  DirectoryIsNotEmpty where something is in it (facts ``delete-hns-directory-with-snapshots-header`` and
  ``delete-hns-directory-not-empty``).
- A path is a file or a directory, never both. Writing over a directory, or below a file, is a conflict. A listing
  whose prefix leads through a file is an error, as the documentation of List Blobs says. The codes of conflicts are a
  guess, because no source documents them, so no test may depend on them.
- Empty segments and slashes at either end of a path vanish.
- A SAS for a directory (``sr=d``, `directory_sas`) allows requests below it, listings included, and no others.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import threading
import urllib.parse
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from azure.storage.blob import BlobClient, ContainerClient

from azure_torch_ckpt.emulator import Azurite
from tests.support.forwarding import ForwardingHandler, ForwardingServer, Response

_KEY = Azurite.account_key
_CHANGES = {"PUT", "DELETE"}


@dataclass(slots=True)
class Seen:
    """A request: of the container `container` and the blob `path`, if any."""

    method: str
    container: str
    path: str
    query: dict[str, str]
    status: int = 0


class _Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


@dataclass(slots=True)
class _Container:
    name: str
    directories: set[str] = field(default_factory=set)


class HierarchicalAccount(ForwardingServer):
    """See the module's docstring.

    Attributes:
        log: every request, in the order of its end.
    """

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream, _Handler)
        self.log: list[Seen] = []
        self.lock = threading.RLock()
        self._containers: dict[str, _Container] = {}

    def create_container(self, name: str) -> str:
        with ContainerClient(self.upstream, name, _KEY) as client:
            client.create_container()
        return f"{self.endpoint}/{name}"

    def paths(self, url: str) -> list[str]:
        """Blobs and directories in the container of a URL; directories end in "/"."""
        name = urlsplit(url).path.split("/")[2]
        with ContainerClient(self.upstream, name, _KEY) as client:
            known = self.container(name).directories
            return [blob + "/" if blob in known else blob for blob in client.list_blob_names()]

    def directory_sas(self, url: str, permissions: str) -> str:
        """A SAS for the directory at a URL."""
        container, _, path = urlsplit(url).path.split("/", 2)[2].partition("/")
        depth = len(path.split("/"))
        query = {"sp": permissions, "sr": "d", "sdd": str(depth), "sig": _signature(container, path, permissions)}
        return urllib.parse.urlencode(query)

    def container(self, name: str) -> _Container:
        with self.lock:
            return self._containers.setdefault(name, _Container(name))

    # The namespace

    def is_directory(self, container: str, path: str) -> bool:
        return path in self.container(container).directories

    def is_file(self, container: str, path: str) -> bool:
        if self.is_directory(container, path):
            return False
        with BlobClient(self.upstream, container, path, credential=_KEY) as client:
            return client.exists()

    def is_empty(self, container: str, path: str) -> bool:
        with ContainerClient(self.upstream, container, _KEY) as client:
            return next(iter(client.list_blob_names(name_starts_with=path + "/", results_per_page=1)), None) is None

    def make_directories(self, container: str, path: str) -> None:
        """Make those above `path`. Raises `_Refused` where one of them is a file."""
        for above in _above(path):
            if self.is_directory(container, above):
                continue
            if self.is_file(container, above):
                raise _Refused(409, "ResourceTypeMismatch")
            with BlobClient(self.upstream, container, above, credential=_KEY) as client:
                client.upload_blob(b"", metadata={"hdi_isfolder": "true"})
            self.container(container).directories.add(above)


class _Handler(ForwardingHandler):
    double: HierarchicalAccount

    def respond(self, body: bytes) -> Response:
        target = urlsplit(self.path)
        query = dict(parse_qsl(target.query, keep_blank_values=True))
        _, account, container, *rest = unquote(target.path).split("/", 3)
        given = rest[0] if rest else ""
        path = "/".join(filter(None, given.split("/")))
        seen = Seen(self.command, container, path, query)
        try:
            # No request may remove a directory after another has seen it and before that one writes into it. Blocks do
            # not matter: uncommitted ones are not in the namespace.
            if self.command in _CHANGES and query.get("comp") != "block":
                with self.double.lock:
                    status, headers, content = self._carry_out(seen, account, given, body)
            else:
                status, headers, content = self._carry_out(seen, account, given, body)
        except _Refused as refused:
            status, code = refused.status, refused.code
            headers = {"x-ms-error-code": code, "Content-Type": "application/xml"}
            error = f"<Error><Code>{code}</Code><Message>{code}\nRequestId:1\nTime:2</Message></Error>"
            content = f"<?xml version='1.0' encoding='utf-8'?>{error}".encode()
        seen.status = status
        self.double.log.append(seen)
        return status, headers, content

    def _carry_out(self, seen: Seen, account: str, given: str, body: bytes) -> Response:
        made = self._prepare(seen) if seen.path else None
        if seen.query.get("comp") == "list" and not seen.path:
            self._check_prefix(seen)
        resign = seen.path != given
        if seen.query.get("sr") == "d":
            self._check_directory_sas(seen)
            resign = True
        status, headers, content = self._forward(seen, account, body, resign)
        if not seen.path:
            if status == 200 and seen.query.get("comp") == "list":
                content = self._listing(seen, content)
            return status, headers, content
        directories = self.double.container(seen.container).directories
        if status < 300:
            if made:
                directories.add(seen.path)
            if seen.method == "DELETE":
                directories.discard(seen.path)
            if seen.method in ("GET", "HEAD") and "comp" not in seen.query:
                headers["x-ms-resource-type"] = "directory" if seen.path in directories else "file"
        return status, headers, content

    def _prepare(self, seen: Seen) -> bool:
        """Whether the request makes a directory. Raises `_Refused` where the namespace does not allow it."""
        account, is_directory = self.double, self.double.is_directory(seen.container, seen.path)
        if seen.method == "DELETE" and is_directory:
            if "x-ms-delete-snapshots" in self.headers:
                raise _Refused(400, "OperationNotSupportedOnDirectory")
            if not account.is_empty(seen.container, seen.path):
                raise _Refused(409, "DirectoryIsNotEmpty")
        if seen.method != "PUT" or seen.query.get("comp") not in (None, "block", "blocklist"):
            return False
        source = self.headers.get("x-ms-copy-source")
        if source is not None:
            _, _, container, path = unquote(urlsplit(source).path).split("/", 3)
            if account.is_directory(container, path):
                raise _Refused(400, "OperationNotSupportedOnDirectory")
        makes = any(
            name.lower() == "x-ms-meta-hdi_isfolder" and value.lower() == "true" for name, value in self.headers.items()
        )
        if is_directory and not makes:
            raise _Refused(409, "ResourceTypeMismatch")
        with account.lock:
            account.make_directories(seen.container, seen.path)
        return makes

    def _check_prefix(self, seen: Seen) -> None:
        for above in _above(seen.query.get("prefix", "")):
            if self.double.is_file(seen.container, above):
                raise _Refused(409, "ResourceTypeMismatch")

    def _check_directory_sas(self, seen: Seen) -> None:
        query = seen.query
        where = seen.path or query.get("prefix", "").rstrip("/")
        directory = "/".join(where.split("/")[: int(query["sdd"])])
        needed = {"GET": "r", "HEAD": "r", "PUT": "cw", "DELETE": "d"}[seen.method]
        needed = "l" if query.get("comp") == "list" else needed
        if not hmac.compare_digest(query["sig"], _signature(seen.container, directory, query["sp"])):
            raise _Refused(403, "AuthenticationFailed")
        if not set(needed) & set(query["sp"]):
            raise _Refused(403, "AuthorizationPermissionMismatch")

    def _forward(self, seen: Seen, account: str, body: bytes, resign: bool) -> Response:
        if not resign:
            return self.forward(self.path, body)
        query = {name: value for name, value in seen.query.items() if name not in ("sp", "sr", "sdd", "sig")}
        target = quote(f"/{account}/{seen.container}/{seen.path}".rstrip("/"))
        headers = _signed(seen.method, account, target, query, dict(self.headers), len(body))
        return self.forward(target + ("?" + urllib.parse.urlencode(query) if query else ""), body, headers)

    def _listing(self, seen: Seen, content: bytes) -> bytes:
        """Tell what the entries are and, with a delimiter, show each directory once, as a prefix."""
        root = ElementTree.fromstring(content)
        blobs = root.find("Blobs")
        assert blobs is not None
        directories = self.double.container(seen.container).directories
        prefixes = {entry.findtext("Name") for entry in blobs.findall("BlobPrefix")}
        for entry in list(blobs.findall("Blob")):
            name = entry.findtext("Name") or ""
            is_directory = name in directories
            properties = entry.find("Properties")
            assert properties is not None
            ElementTree.SubElement(properties, "ResourceType").text = "directory" if is_directory else "file"
            if is_directory and seen.query.get("delimiter"):
                blobs.remove(entry)
                if name + "/" not in prefixes:
                    prefix = ElementTree.SubElement(blobs, "BlobPrefix")
                    ElementTree.SubElement(prefix, "Name").text = name + "/"
        return cast(bytes, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _above(path: str) -> Iterator[str]:
    """The directories that a path leads through, from the top."""
    for position, char in enumerate(path):
        if char == "/" and position:
            yield path[:position]


def _signature(*parts: str) -> str:
    digest = hmac.new(base64.b64decode(_KEY), "\n".join(parts).encode(), hashlib.sha256).digest()
    return base64.b64encode(digest).decode()


def _signed(
    method: str, account: str, path: str, query: dict[str, str], headers: dict[str, str], length: int
) -> dict[str, str]:
    """The headers of a request to the emulator. https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key"""
    headers = {
        name: value for name, value in headers.items() if name.lower() not in ("authorization", "date", "x-ms-date")
    }
    headers["x-ms-date"] = email.utils.formatdate(usegmt=True)
    lowered = {name.lower(): value for name, value in headers.items()}
    standard = "content-encoding content-language content-length content-md5 content-type date if-modified-since"
    standard += " if-match if-none-match if-unmodified-since range"
    lowered["content-length"] = str(length) if length else ""
    text = "\n".join([method, *(lowered.get(name, "") for name in standard.split())]) + "\n"
    text += "".join(f"{name}:{lowered[name]}\n" for name in sorted(lowered) if name.startswith("x-ms-"))
    text += f"/{account}{path}"
    text += "".join(f"\n{name.lower()}:{query[name]}" for name in sorted(query))
    headers["Authorization"] = f"SharedKey {account}:{_signature(text)}"
    return headers

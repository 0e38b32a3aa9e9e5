"""One container: its clients and their errors (`ContainerConnection`), and its blobs (`ContainerListing`)."""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.utils
import itertools
import urllib.parse
from collections.abc import Iterator
from typing import Any
from xml.parsers import expat

from azure.core.exceptions import AzureError
from azure.core.paging import ItemPaged
from azure.core.rest import HttpResponse
from azure.storage.blob import BlobClient, ContainerClient, ContentSettings

from azure_torch_ckpt.blobs.blob_info import BLOCK_BLOB, LEASED, BlobInfo, quoted_etag
from azure_torch_ckpt.blobs.direct_requests import USER_AGENT, DirectRequests
from azure_torch_ckpt.blobs.error_translation import translate
from azure_torch_ckpt.credentials import Access, environment_note, resolve
from azure_torch_ckpt.errors import RequestRefusedError
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions
from azure_torch_ckpt.transport.buffers import Doubt
from azure_torch_ckpt.transport.gather_transport import GatherTransport
from azure_torch_ckpt.transport.retry import RetryPolicy
from azure_torch_ckpt.transport.throttle import RequestCounts, Throttle

__all__ = ["ContainerConnection", "ContainerListing", "ListPage"]

# Larger than any blob (about 190.7 TiB), so that the SDK sends one request for one call.
_ONE_REQUEST = 1 << 48
_KEPT_CLIENTS = 64
_CHUNK = 64 * 1024
_MONTHS = {
    name: number
    for number, name in enumerate("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), start=1)  # noqa: SIM905
}
# The element that replaces metadata whose name cannot be an XML element's.
_NAMELESS = "x-ms-invalid-name"


class ContainerConnection:
    """Base of `BlobStore`, which documents the arguments."""

    def __init__(self, location: BlobLocation, access: Access | None = None) -> None:
        self.location = location.container_root()
        self.access = access = access or Access()
        # Refuses a wrong credential now, not in a worker thread later.
        self._credential = resolve(location, access.credential)
        self._client: ContainerClient | None = None
        self._requests: DirectRequests | None = None
        self._blobs: dict[str, BlobClient] = {}  # by the blob's path
        self._transport = GatherTransport(ca_file=access.ca_file)
        self.throttle = Throttle()
        self.has_directories: bool | None = None
        """Whether the account has a hierarchical namespace; None while that is unknown."""

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "access": self.access}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["location"], state["access"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"BlobStore({str(self.location)!r})"

    def _container(self) -> ContainerClient:
        # Without a lock, because a fork might copy it held. Two threads that come first make a client each, and one
        # stays.
        client = self._client
        if client is None:
            self._client = client = ContainerClient(
                self.location.endpoint,
                self.location.container,
                credential=self._credential,
                transport=self._transport,
                retry_policy=RetryPolicy(self.options.retry_seconds, self.throttle),
                user_agent=USER_AGENT,
                max_single_get_size=_ONE_REQUEST,
                max_single_put_size=_ONE_REQUEST,
            )
        return client

    def _direct(self) -> DirectRequests:
        # Without a lock, as above.
        direct = self._requests
        if direct is None:
            self._requests = direct = DirectRequests(
                self._credential,
                self._transport,
                RetryPolicy(self.options.retry_seconds, self.throttle),
                self._container().api_version,
            )
        return direct

    def _blob(self, path: str, moment: BlobLocation | None = None) -> BlobClient:
        if moment is None:
            # Several requests for one blob follow each other, and a client costs a fifth of the CPU time of a request.
            client = self._blobs.get(path)
            if client is None:
                client = self._container().get_blob_client(path)
                if len(self._blobs) >= _KEPT_CLIENTS:
                    self._blobs = {}
                self._blobs[path] = client
            return client
        # The declared type of `snapshot` lacks None, which is its default.
        return self._container().get_blob_client(path, moment.snapshot or "", version_id=moment.version_id)

    @property
    def options(self) -> TransferOptions:
        return self.access.options

    @property
    def counts(self) -> RequestCounts:
        """How many requests this store has sent in this process, and how many of them were retries."""
        return self.throttle.counts

    @contextlib.contextmanager
    def _translated(self, doing: str, path: str, doubt: Doubt | None = None) -> Iterator[None]:
        try:
            yield
        except AzureError as error:
            where = f"{self.location}/{path}" if path else str(self.location)
            note = environment_note(self.location, self.access.credential)
            anonymous = self._credential is None
            translated = translate(error, f"could not {doing} {where}", self.location, anonymous=anonymous, note=note)
            if doubt is not None:
                translated.may_be_done = doubt.exists
            raise translated from error


class ContainerListing(ContainerConnection):
    """Base of `BlobStore`: its verbs that list, by https://learn.microsoft.com/rest/api/storageservices/list-blobs."""

    def list(self, prefix: str, *, limit: int | None = None) -> Iterator[BlobInfo]:
        """List Blobs: yield all blobs whose names start with `prefix`, in the order of their names, 5,000 to a request.

        They include the folders that are blobs: `BlobInfo.is_folder`.

        Args:
            limit: the largest number of blobs.
        """
        for entry in itertools.islice(self._listed(prefix, limit=limit), limit):
            assert isinstance(entry, BlobInfo)
            yield entry

    def list_folder(self, prefix: str) -> Iterator[BlobInfo | str]:
        """List Blobs with the delimiter "/": yield blobs directly under `prefix`, and prefixes (str, ending in "/")."""
        return self._listed(prefix, delimiter="/")

    def now(self, prefix: str = "") -> datetime.datetime:
        """Return the time of the service's clock, which also sets `BlobInfo.last_modified`.

        Args:
            prefix: of a listing that the credential allows: a SAS may be for one directory only.
        """
        date = self._list_page(prefix, limit=1).headers.get("Date")
        if date is None:
            raise RequestRefusedError(f"could not get the time: {self.location.endpoint} sends no Date header")
        return email.utils.parsedate_to_datetime(date)

    def _listed(
        self, prefix: str, *, delimiter: str | None = None, limit: int | None = None
    ) -> Iterator[BlobInfo | str]:
        marker = ""
        while True:
            response = self._list_page(prefix, delimiter=delimiter, limit=limit, marker=marker)
            page = ListPage(response.content)
            try:
                yield from page
                if page.marker and page.marker == marker:
                    raise ValueError("its next page is itself")
            except ValueError as error:
                raise RequestRefusedError(
                    f"could not list {self.location}/{prefix}: the answer is not a listing ({error}). Check the URL, "
                    "and the proxies between this machine and the service"
                ) from error
            if not page.marker:
                return
            marker = page.marker

    def _list_page(
        self, prefix: str, *, delimiter: str | None = None, limit: int | None = None, marker: str = ""
    ) -> HttpResponse:
        with self._translated("list", prefix):
            container = self._container()
            response = self._direct().list_page(container.url, prefix, delimiter=delimiter, limit=limit, marker=marker)
            if response is not None:
                return response
            # The client parses the page itself, slowly. The page that it received is the same.
            answers: list[HttpResponse] = []
            options: dict[str, Any] = {
                "name_starts_with": prefix or None,
                "include": "metadata",
                "results_per_page": limit,
                "answers": answers,
            }
            pages: ItemPaged[Any]
            if delimiter is None:
                pages = container.list_blobs(**options)
            else:
                pages = container.walk_blobs(delimiter=delimiter, **options)
            try:
                next(pages.by_page(marker or None), None)
            except AzureError:
                if not answers or answers[-1].status_code >= 300:
                    raise
                # An answer came and is not a listing: the caller reports that.
            return answers[-1]  # earlier ones may be answers of a proxy


class ListPage:
    """Iterate over the blobs (`BlobInfo`) and, with a delimiter, the prefixes (str) of a page, in the page's order.

    Deleted blobs, snapshots and old versions are left out. The page is parsed as a stream: a folder of checkpoints has
    tens of thousands of blobs, and an object for each XML element of each blob would cost ten times as much as the
    blobs' properties. So expat's callbacks make one `BlobInfo` for a blob.

    Attributes:
        marker: of the next page, empty for the last one; valid after the last entry.

    Raises (on iteration):
        ValueError: the body is not a page of List Blobs. A document type, which all attacks on XML parsers need, is
        refused.
    """

    def __init__(self, body: bytes) -> None:
        self.marker = ""
        self._body = body
        self._entries: list[BlobInfo | str] = []
        self._depth = 0
        self._text = ""
        self._fields: dict[str, str] = {}
        self._metadata: dict[str, str] = {}
        self._name_is_encoded = False
        self._part = ""  # the open element directly below a blob; users choose the names of those below Metadata

    def __iter__(self) -> Iterator[BlobInfo | str]:
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.CharacterDataHandler = self._add_text
        parser.EndElementHandler = self._end
        parser.StartDoctypeDeclHandler = _refuse
        view = memoryview(self._body)
        try:
            for start in range(0, len(view), _CHUNK):
                parser.Parse(view[start : start + _CHUNK], False)
                entries, self._entries = self._entries, []
                yield from entries
            parser.Parse(b"", True)
        except (expat.ExpatError, KeyError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._text = ""
        depth = self._depth
        self._depth = depth + 1
        if depth == 3:
            self._part = name
            if attributes and name == "Name":
                self._name_is_encoded = attributes.get("Encoded") == "true"
        elif depth == 0 and name != "EnumerationResults":
            raise ValueError(f"the answer is {name!r}")

    def _add_text(self, text: str) -> None:
        self._text += text

    def _end(self, name: str) -> None:
        depth = self._depth = self._depth - 1
        if depth == 4:
            if self._part == "Properties":
                self._fields[name] = self._text
            elif self._part == "Metadata" and name != _NAMELESS:
                self._metadata[name] = self._text
        elif depth == 3:
            self._fields[name] = self._text
        elif depth == 2:
            self._end_entry(name)
        elif depth == 1 and name == "NextMarker":
            self.marker = self._text
        self._text = ""

    def _end_entry(self, kind: str) -> None:
        fields, self._fields = self._fields, {}
        metadata, self._metadata = self._metadata, {}
        encoded, self._name_is_encoded = self._name_is_encoded, False
        if kind not in ("Blob", "BlobPrefix"):
            return
        name = fields["Name"]
        if encoded:  # it has characters that XML does not allow
            name = urllib.parse.unquote(name)
        if kind == "BlobPrefix":
            self._entries.append(name)
            return
        if "Snapshot" in fields or fields.get("Deleted") == "true" or fields.get("IsCurrentVersion") == "false":
            return
        given = fields.get
        md5, created = given("Content-MD5"), given("Creation-Time")
        hash_of_content = base64.b64decode(md5) if md5 else None
        self._entries.append(
            BlobInfo(
                name,
                int(fields["Content-Length"]),
                quoted_etag(fields["Etag"]),
                _time(fields["Last-Modified"]),
                hash_of_content,
                metadata or None,
                _time(created) if created else None,
                ContentSettings(
                    given("Content-Type") or None,
                    given("Content-Encoding") or None,
                    given("Content-Language") or None,
                    given("Content-Disposition") or None,
                    given("Cache-Control") or None,
                    None if hash_of_content is None else bytearray(hash_of_content),
                ),
                int(given("TagCount") or 0),
                given("BlobType") or BLOCK_BLOB,
                given("ResourceType"),
                given("LeaseStatus") == LEASED,
            )
        )


def _time(text: str) -> datetime.datetime:
    """Parse "Wed, 09 Sep 2026 09:20:02 GMT" (RFC 1123), ten times as fast as `email.utils`."""
    return datetime.datetime(
        int(text[12:16]),
        _MONTHS[text[8:11]],
        int(text[5:7]),
        int(text[17:19]),
        int(text[20:22]),
        int(text[23:25]),
        tzinfo=datetime.timezone.utc,
    )


def _refuse(name: str, *_: object) -> None:
    raise ValueError(f"it declares a document type ({name[:40]!r})")
